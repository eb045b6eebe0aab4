"""A plan becomes one flat batch with the right positions, slots, groups and sampling places."""

import pytest
import torch
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.inputs import ABSORBED_MAX_NEW_TOKENS, build_inputs
from glimmer.workers.rows import RowTable

PARAMS = SamplingParams(max_new_tokens=4)


def table_with(lengths: list[int], pages: int = 200) -> RowTable:
    """Row r holds lengths[r] tokens in pages 1000 * r + i; its last token is 70 + r."""
    table = RowTable(len(lengths), pages, 4, 100, "cpu")
    admits = [
        RowAdmit(row, PARAMS, [1000 * row + i for i in range(pages)], length, 0, [])
        for row, length in enumerate(lengths)
    ]
    table.apply(StepPlan(0, 0, [], admits, [], [], []))
    table.last_token[:-1] += torch.arange(70, 70 + len(lengths))
    return table


def plan(prefill: list[PrefillChunk], decode: list[int]) -> StepPlan:
    return StepPlan(0, 1, [], [], [], prefill, decode)


def test_mixed_step() -> None:
    table = table_with([6, 0, 9, 5])
    chunks = [
        PrefillChunk(0, 6, [10, 11, 12], sample=True),  # extends: absorbed
        PrefillChunk(1, 0, [20, 21], sample=False, next_id=22),  # fresh: up-projected, first
    ]
    inputs = build_inputs(plan(chunks, [2, 3]), table)
    assert inputs.token_ids.tolist() == [20, 21, 10, 11, 12, 72, 73]
    assert inputs.positions.tolist() == [0, 1, 6, 7, 8, 9, 5]
    assert inputs.slots.tolist() == [4000, 4001, 6, 7, 8, 8009, 12005]
    assert inputs.chunk_spans == [slice(2, 5), slice(0, 2)]
    assert inputs.sampling_rows == [0, 2, 3]
    assert inputs.sampling_index.tolist() == [4, 5, 6]
    fresh, extended, decode = inputs.groups
    assert (fresh.span, fresh.absorbed, fresh.rows.max_query_len) == (slice(0, 2), False, 2)
    assert (extended.span, extended.absorbed) == (slice(2, 5), True)
    assert extended.rows.lengths.tolist() == [9]
    assert extended.rows.page_table.tolist() == [[0, 1, 2]]
    assert (decode.span, decode.absorbed, decode.rows.max_query_len) == (slice(5, 7), True, 1)
    assert decode.rows.lengths.tolist() == [10, 6]
    assert (decode.rows.max_length, decode.rows.page_table.shape[1]) == (10, 3)
    assert decode.rows.query_starts.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("start", "count", "absorbed"),
    [
        (0, 1, False),
        (0, ABSORBED_MAX_NEW_TOKENS, False),
        (4, 1, True),
        (4, ABSORBED_MAX_NEW_TOKENS, True),
        (4, ABSORBED_MAX_NEW_TOKENS + 1, False),
    ],
)
def test_short_extensions_are_absorbed(start: int, count: int, absorbed: bool) -> None:
    chunk = PrefillChunk(0, start, [1] * count, sample=True)
    groups = build_inputs(plan([chunk], []), table_with([start])).groups
    assert [group.absorbed for group in groups] == [absorbed]


def test_sampling_order_is_that_of_the_plan() -> None:
    """Whatever order attention wants: the result is parallel to the plan."""
    table = table_with([4, 0, 8])
    chunks = [
        PrefillChunk(0, 4, [1], sample=True),
        PrefillChunk(1, 0, [2, 3, 4], sample=True),
        PrefillChunk(2, 8, [5, 6], sample=True),
    ]
    inputs = build_inputs(plan(chunks, []), table)
    assert inputs.sampling_rows == [0, 1, 2]
    assert inputs.token_ids[inputs.sampling_index].tolist() == [1, 4, 6]


def test_plans_that_would_corrupt_other_rows_are_refused() -> None:
    table = table_with([4, 0], pages=2)
    with pytest.raises(ValueError, match="row 0 has 4 tokens, its chunk starts at 3"):
        build_inputs(plan([PrefillChunk(0, 3, [1], sample=True)], []), table)
    with pytest.raises(ValueError, match="row 1: 9 new tokens"):
        build_inputs(plan([PrefillChunk(1, 0, [1] * 9, sample=True)], []), table)
    with pytest.raises(ValueError, match="row 1"):
        build_inputs(plan([PrefillChunk(1, 0, [], sample=False)], []), table)
    table.advance([0], [4])
    with pytest.raises(ValueError, match="row 0"):
        build_inputs(plan([], [0]), table)
