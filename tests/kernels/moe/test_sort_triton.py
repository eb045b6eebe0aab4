"""Pairs of tokens and experts sorted by expert, against sorting in Python."""

import pytest
import torch
from glimmer.kernels.moe import sort_triton
from glimmer.kernels.moe.sort_triton import sort_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("most_in_one_launch", [0, 5120])
@pytest.mark.parametrize(
    ("num_tokens", "experts", "k", "block"),
    [(1, 5, 2, 4), (5, 5, 2, 4), (350, 5, 2, 4), (40, 33, 3, 16), (1400, 33, 4, 32)],
)
def test_sorted_pairs_are_each_experts_in_order(
    num_tokens: int,
    experts: int,
    k: int,
    block: int,
    most_in_one_launch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one launch and in two; with fewer and with more chunks of pairs than experts."""
    monkeypatch.setattr(sort_triton, "_ONE_LAUNCH", most_in_one_launch)
    ids = torch.rand(num_tokens, experts, device=DEVICE).argsort(-1)[:, :k].contiguous()
    pairs, owners = sort_pairs(ids, experts, block)
    expected, names = [], []
    for expert in reversed(range(experts)):
        of_expert = (ids.flatten() == expert).nonzero().flatten().tolist()
        of_expert += [ids.numel()] * (-len(of_expert) % block)
        expected += of_expert
        names += [expert] * (len(of_expert) // block)
    assert pairs.tolist()[: len(expected)] == expected
    assert owners.tolist() == names + [-1] * (len(owners) - len(names))


def test_the_example_of_the_docstring() -> None:
    ids = torch.tensor([[0, 2], [1, 2], [0, 2]], device=DEVICE)
    pairs, owners = sort_pairs(ids, 3, 2)
    assert pairs.tolist()[:8] == [1, 3, 5, 6, 2, 6, 0, 4]
    assert owners.tolist() == [2, 2, 1, 0, -1, -1]
