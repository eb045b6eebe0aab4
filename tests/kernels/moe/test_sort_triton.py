"""Pairs of tokens and experts sorted by expert, against sorting in Python."""

import pytest
import torch
from glimmer.kernels.moe.sort_triton import sort_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("experts", "k", "block"), [(5, 2, 4), (33, 3, 16), (65, 4, 32)])
@pytest.mark.parametrize("num_tokens", [1, 5, 40, 350, 1400])
def test_sorted_pairs_are_each_experts_in_order(
    num_tokens: int, experts: int, k: int, block: int
) -> None:
    ids = torch.rand(num_tokens, experts, device=DEVICE).argsort(-1)[:, :k].contiguous()
    pairs, owners = sort_pairs(ids, experts, block)
    expected, names = [], []
    for expert in reversed(range(experts)):
        mine = (ids.flatten() == expert).nonzero().flatten().tolist()
        mine += [ids.numel()] * (-len(mine) % block)
        expected += mine
        names += [expert] * (len(mine) // block)
    assert pairs.tolist()[: len(expected)] == expected
    assert owners.tolist() == names + [-1] * (len(owners) - len(names))
