"""A plan becomes one flat batch with the right positions, slots, groups and sampling points."""

import pytest
import torch
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.inputs import ABSORBED_MAX_NEW_TOKENS, build_batch
from glimmer.workers.rows import RowTable

PARAMS = SamplingParams(max_new_tokens=4)


def table_with(lengths: list[int], pages: int = 200, max_drafts: int = 0) -> RowTable:
    """Row r holds lengths[r] tokens in pages 1000 * r + i; its last token is 70 + r."""
    table = RowTable(len(lengths), pages, 4, 100, "cpu", max_drafts)
    admits = [
        RowAdmit(row, PARAMS, [1000 * row + i for i in range(pages)], length, row, [])
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
    batch = build_batch(plan(chunks, [2, 3]), table)
    inputs = batch.inputs
    assert inputs.token_ids.tolist() == [20, 21, 10, 11, 12, 72, 73]
    assert inputs.positions.tolist() == [0, 1, 6, 7, 8, 9, 5]
    assert inputs.slots.tolist() == [4000, 4001, 6, 7, 8, 8009, 12005]
    assert batch.packed is not None
    assert batch.packed.chunk_spans == [slice(2, 5), slice(0, 2)]
    assert batch.packed.rows.tolist() == [1, 0, 2, 3]
    assert batch.packed.added.tolist() == [[2, 3, 1, 1], [0, 1, 1, 1]]
    assert batch.points.rows.tolist() == [0, 2, 3]
    assert batch.points.positions.tolist() == [0, 2, 3]
    assert batch.sampling_index is not None
    assert batch.sampling_index.tolist() == [4, 5, 6]
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
    groups = build_batch(plan([chunk], []), table_with([start])).inputs.groups
    assert [group.absorbed for group in groups] == [absorbed]


def test_sampling_order_is_that_of_the_plan() -> None:
    """Whatever order attention wants: the result is parallel to the plan."""
    table = table_with([4, 0, 8])
    chunks = [
        PrefillChunk(0, 4, [1], sample=True),
        PrefillChunk(1, 0, [2, 3, 4], sample=True),
        PrefillChunk(2, 8, [5, 6], sample=True),
    ]
    batch = build_batch(plan(chunks, []), table)
    assert batch.points.rows.tolist() == [0, 1, 2]
    assert batch.inputs.token_ids[batch.sampling_index].tolist() == [1, 4, 6]


def test_plans_that_would_corrupt_other_rows_are_refused() -> None:
    table = table_with([4, 0], pages=2)
    with pytest.raises(ValueError, match="row 0 has 4 tokens, its chunk starts at 3"):
        build_batch(plan([PrefillChunk(0, 3, [1], sample=True)], []), table)
    with pytest.raises(ValueError, match="row 1: 9 new tokens"):
        build_batch(plan([PrefillChunk(1, 0, [1] * 9, sample=True)], []), table)
    with pytest.raises(ValueError, match="row 1"):
        build_batch(plan([PrefillChunk(1, 0, [], sample=False)], []), table)
    table.min_tokens[0] += 4
    with pytest.raises(ValueError, match="row 0"):
        build_batch(plan([], [0]), table)


def test_with_drafts_the_token_after_each_chunk_token_is_known_or_will_be_sampled() -> None:
    table = table_with([6, 0, 9], max_drafts=2)
    table.drafts[2] = torch.tensor([81, 82])
    chunks = [
        PrefillChunk(0, 6, [10, 11, 12], sample=True),
        PrefillChunk(1, 0, [20, 21], sample=False, next_id=22),
    ]
    batch = build_batch(StepPlan(0, 1, [], [], [], chunks, [2], 2), table)
    assert batch.packed is not None
    assert batch.packed.next_ids.tolist() == [21, 22, 11, 12, 0]
    assert batch.packed.num_chunk_points == 1
    assert batch.inputs.token_ids.tolist() == [20, 21, 10, 11, 12, 72, 81, 82]
    assert batch.inputs.positions.tolist() == [0, 1, 6, 7, 8, 9, 10, 11]
    assert batch.points.rows.tolist() == [0, 2, 2, 2]
    assert batch.points.positions.tolist() == [0, 2, 3, 4]
    assert batch.points.drafts is not None
    assert batch.points.drafts.tolist() == [[-1, -1], [-1, -1], [81, -1], [81, 82]]
    assert batch.sampling_index is not None
    assert batch.sampling_index.tolist() == [4, 5, 6, 7]
