"""Row state follows the plan's deltas."""

from typing import Any

import pytest
import torch
from glimmer.shared.messages import PagesAppended, PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.rows import RowTable

PENALISED = SamplingParams(max_new_tokens=9, presence_penalty=1.0)


def plan(
    freed: Any = (), admitted: Any = (), appended: Any = (), prefill: Any = (), decode: Any = ()
) -> StepPlan:
    return StepPlan(0, 0, *(list(part) for part in (freed, admitted, appended, prefill, decode)))


def sampled(table: RowTable, rows: list[int], ids: list[int]) -> None:
    """A decode step of these rows."""
    index = torch.tensor(rows)
    table.advance(index, table.ones[:, : len(rows)])
    table.rules.penalties.record(rows, index, torch.tensor(ids))
    table.count(plan(decode=rows))


@pytest.fixture
def table() -> RowTable:
    return RowTable(4, 5, 8, 20, "cpu")


def test_admitting_overwrites_what_the_row_held(table: RowTable) -> None:
    table.apply(plan(admitted=[RowAdmit(2, PENALISED, [4, 5, 6], 16, 3, [1, 1, 7])]))
    sampled(table, [2], [7])
    assert table.num_outputs[2] == table.min_outputs[2] == 4
    assert table.rules.penalties.of(2)[[1, 7]].tolist() == [2, 2]
    params = SamplingParams(max_new_tokens=1, temperature=0.5, seed=9, repetition_penalty=1.5)
    table.apply(plan(freed=[2], admitted=[RowAdmit(2, params, [3], 0, 0, [])]))
    assert table.rules.penalties.of(2).sum() == 0
    assert (table.min_tokens[2], table.num_pages[2], table.min_outputs[2]) == (0, 1, 0)
    assert table.lengths[2] == table.num_outputs[2] == 0
    assert table.page_table[2, 0] == 3
    assert table.scalars["temperature"][2] == 0.5
    assert table.scalars["seed"][2] == 9


def test_pages_append_behind_those_a_row_has(table: RowTable) -> None:
    admits = [RowAdmit(row, PENALISED, [row], 0, 0, []) for row in (0, 1)]
    appended = [PagesAppended(1, [9, 8]), PagesAppended(0, [7]), PagesAppended(1, [6])]
    table.apply(plan(admitted=admits, appended=appended))
    assert table.page_table[1, :4].tolist() == [1, 9, 8, 6]
    assert table.page_table[0, :2].tolist() == [0, 7]


def test_counts_only_where_penalties_ask(table: RowTable) -> None:
    free = SamplingParams(max_new_tokens=9)
    table.apply(
        plan(admitted=[RowAdmit(0, free, [], 0, 0, []), RowAdmit(1, PENALISED, [], 0, 0, [])])
    )
    sampled(table, [1, 0], [4, 5])
    assert not table.rules.penalties.concerns([0])
    assert table.rules.penalties.of(1).nonzero().tolist() == [[4]]


def test_counts_after_resume_equal_those_of_a_continuous_run(table: RowTable) -> None:
    table.apply(plan(admitted=[RowAdmit(0, PENALISED, [], 0, 0, [2, 3])]))
    for token in (3, 3, 11):
        sampled(table, [0], [token])
    table.apply(plan(admitted=[RowAdmit(1, PENALISED, [], 0, 3, [2, 3, 3, 3, 11])]))
    assert torch.equal(table.rules.penalties.of(0), table.rules.penalties.of(1))
    assert table.num_outputs[0] == table.num_outputs[1]
    assert table.min_outputs[0] == table.min_outputs[1] == 3


def test_rows_advance_by_what_each_of_them_gains(table: RowTable) -> None:
    table.apply(plan(admitted=[RowAdmit(row, PENALISED, [row], 8, 2, []) for row in (0, 3)]))
    table.advance(torch.tensor([3, 0]), torch.tensor([[5, 1], [0, 1]]))
    assert table.lengths[[0, 3]].tolist() == [9, 13]
    assert table.num_outputs[[0, 3]].tolist() == [3, 2]


def test_room_is_checked_on_the_host(table: RowTable) -> None:
    table.apply(plan(admitted=[RowAdmit(0, PENALISED, [1, 2], 8, 0, [])]))
    table.check_room(0, 8)
    with pytest.raises(ValueError, match="row 0: 9 new tokens make 17, but it has 2 pages of 8"):
        table.check_room(0, 9)
    with pytest.raises(ValueError, match="row 0"):
        table.check_room(0, 0)
    table.count(plan(prefill=[PrefillChunk(0, 8, [1] * 8, sample=False)]))
    assert (table.min_tokens[0], table.min_outputs[0]) == (16, 0)
    table.apply(plan(freed=[0]))
    with pytest.raises(ValueError, match="row 0"):
        table.check_room(0, 1)


def test_more_pages_than_a_row_can_have_are_refused(table: RowTable) -> None:
    with pytest.raises(IndexError):
        table.apply(plan(admitted=[RowAdmit(0, PENALISED, [1, 2, 3, 4, 5, 6], 0, 0, [])]))
