"""Penalties and counts against plain Python."""

import torch
from glimmer.kernels.sampling.penalties import MOST, count, penalise


def test_penalties_follow_the_stated_order() -> None:
    counts = torch.tensor([[9, 9, 9, 9], [3, 1, 0, 0]], dtype=torch.int16)
    slots = torch.tensor([-1, 1], dtype=torch.int32)
    columns = (torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.25]))
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]]).repeat(2, 1)
    got = penalise(logits, torch.tensor([1, 0]), slots, counts, *columns)
    assert got is logits
    assert got.tolist() == [
        [2 / 2 - 1.5 - 0.25, -2 * 2 - 0.5 - 0.25, 1.0, -1.0],
        [2.0, -2.0, 1.0, -1.0],  # has no slot
    ]


def test_drafts_count_for_their_own_logits_alone() -> None:
    counts = torch.tensor([[1, 0, 0]], dtype=torch.int16)
    columns = (torch.ones(1), torch.ones(1), torch.zeros(1))
    drafts = torch.tensor([[-1, -1], [0, -1], [0, 2]])
    rows = torch.zeros(3, dtype=torch.int64)
    got = penalise(torch.zeros(3, 3), rows, rows[:1].int(), counts, *columns, drafts)
    assert got.tolist() == [[-1, 0, 0], [-2, 0, 0], [-2, 0, -1]]
    assert counts.tolist() == [[1, 0, 0]]


def test_counting() -> None:
    counts = torch.zeros(2, 6, dtype=torch.int16)
    counts[1, 4], counts[1, 5] = MOST - 1, 7
    slots = torch.tensor([1, -1, 0], dtype=torch.int32)
    rows, ids = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([4, 2, 3, 3, -1])
    count(rows, ids, slots, counts)
    count(rows[:1], ids[:1], slots, counts)
    assert counts.tolist() == [[0, 0, 0, 2, 0, 0], [0, 0, 0, 0, MOST, 7]]
