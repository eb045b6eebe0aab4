"""The figures that a benchmark's rank computes from its steps."""

import pytest
import torch
from glimmer.deploy.bench.rank import Routing, average_experts, count_distinct, decoded
from glimmer.shared.messages import PrefillChunk, RowResult, StepPlan, StepResult


def test_experts_of_the_main_model_and_of_each_draft_pass() -> None:
    first, second = [2, 4, 6, 5, 1], [4, 6, 8, 7, 2]  # three layers, two passes
    found = average_experts([*first, *second], layers=3, passes=2, steps=2)
    assert found.main == 5
    assert found.drafts == [6, 1.5]


def test_without_drafts_or_experts_there_is_nothing_to_average() -> None:
    assert average_experts([3, 5], layers=1, passes=0, steps=2).drafts == []
    assert average_experts([], layers=0, passes=0, steps=2).main == 0


def test_a_routing_that_is_nobodys_is_noticed() -> None:
    with pytest.raises(AssertionError, match="5 routings in 2 steps of 2"):
        average_experts([1] * 5, layers=1, passes=1, steps=2)


def test_decode_rows_are_counted_and_chunks_are_not() -> None:
    chunk = PrefillChunk(2, 0, [5], sample=True)
    plan = StepPlan(0, 0, [], [], [], [chunk], [0, 1], 2)
    result = StepResult(0, 0, [RowResult([4]), RowResult([1, 2, 3]), RowResult([7, 8])])
    assert decoded(plan, result) == [3, 2]
    assert decoded(StepPlan(0, 0, [], [], [], [chunk], []), StepResult(0, 0, result.rows[:1])) == []
    with pytest.raises(RuntimeError, match="no memory"):
        decoded(plan, StepResult(0, 0, [], error="no memory"))
    with pytest.raises(RuntimeError, match="too complex"):
        decoded(plan, StepResult(0, 0, [*result.rows[:2], RowResult([], error="too complex")]))


def test_routings_are_recorded_in_order_and_only_when_asked() -> None:
    routing = Routing()
    routing(torch.tensor([[7]]))
    with routing.recorded() as seen:
        for experts in ([0, 1, 1], [2, 2, 2]):
            routing(torch.tensor(experts)[:, None])
    routing(torch.tensor([[7]]))
    assert [ids.flatten().tolist() for ids in seen] == [[0, 1, 1], [2, 2, 2]]
    assert count_distinct(seen) == [2, 1]


def test_an_error_ends_the_recording() -> None:
    routing = Routing()
    with pytest.raises(KeyError), routing.recorded() as seen:
        raise KeyError
    routing(torch.tensor([[7]]))
    assert seen == []
