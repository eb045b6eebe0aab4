"""Slots of the rows that have penalties."""

import torch
from glimmer.workers.sampling.penalties import PenaltyCounts


def test_slots_are_taken_given_back_and_never_mixed_up() -> None:
    counts = PenaltyCounts(40, 11, "cpu")
    for row in range(30):
        counts.admit(row, [row % 11] * (row + 1))
    assert [counts.of(row).sum() for row in range(30)] == list(range(1, 31))
    for row in range(0, 30, 2):
        counts.free(row)
        counts.free(row)
    assert not counts.concerns(range(0, 40, 2))
    assert counts.concerns([0, 1])
    counts.admit(35, [])
    counts.admit(1, [3])
    assert counts.of(35).sum() == 0
    assert counts.of(1)[:11].tolist() == [0, 0, 0, 1, *[0] * 7]
    assert [counts.of(row).sum() for row in range(3, 30, 2)] == list(range(4, 31, 2))
    assert (counts.slots >= 0).nonzero().flatten().tolist() == [*range(1, 30, 2), 35]


def test_recorded_tokens_count_where_there_is_a_slot() -> None:
    counts = PenaltyCounts(4, 8, "cpu")
    counts.record([0], torch.tensor([0]), torch.tensor([5]))
    counts.admit(2, [])
    counts.record([1, 2], torch.tensor([1, 2, 2, 2]), torch.tensor([5, 6, 6, -1]))
    assert counts.of(2).tolist() == [0, 0, 0, 0, 0, 0, 2, 0]


def test_counts_of_admission_end_where_all_counting_does() -> None:
    counts = PenaltyCounts(1, 4, "cpu")
    counts.admit(0, [1] * 70_000 + [2])
    assert counts.of(0).tolist() == [0, 32_000, 1, 0]
