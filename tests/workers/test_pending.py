"""What a launched step tells about itself."""

import torch
from glimmer.shared.messages import RowResult, StepPlan
from glimmer.workers.drafting import Step
from glimmer.workers.pending import PendingStep
from glimmer.workers.sampling.sampler import Sampled

PLAN = StepPlan(0, 1, [], [], [], [], [])


def sampled(rows: list[int], ids: list[int]) -> Sampled:
    return Sampled(rows, torch.tensor(ids), torch.ones(len(ids)))


def test_nothing_sampled_is_done_at_once() -> None:
    step = PendingStep(PLAN, [])
    assert step.is_done
    assert step.read() == []
    assert step.results == []


def test_a_token_for_each_row() -> None:
    step = PendingStep(PLAN, [], rows=[4, 2], sampled=sampled([4, 2], [7, 8]))
    step.start_copy(torch.device("cpu"))
    assert step.is_done
    assert step.read() == [(4, 7), (2, 8)]
    assert step.results == [RowResult([7]), RowResult([8])]


def test_with_drafts_rows_keep_some_of_their_places() -> None:
    rows = [9, 4, 4, 4, 2, 2, 2]  # a chunk, then two rows with two drafts
    drafted = Step(rows, torch.tensor([3, 1]), 1, 2)
    step = PendingStep(PLAN, [], rows=rows, drafted=drafted)
    step.sampled = sampled(rows, [1, 2, 3, 4, 5, 6, 7])
    step.start_copy(torch.device("cpu"))
    assert step.read() == [(9, 1), (4, 2), (4, 3), (4, 4), (2, 5)]
    assert step.results == [RowResult([1]), RowResult([2, 3, 4]), RowResult([5])]


def test_other_ranks_tell_only_that_they_are_done() -> None:
    step = PendingStep(PLAN, [], rows=[4])
    step.start_copy(torch.device("cpu"))
    assert step.is_done
    assert step.read() == []
