"""Latents land in their slots and nowhere else."""

import pytest
import torch
from glimmer.kernels.attention.kv_write import kv_write


@pytest.mark.parametrize("count", [0, 1, 7])
def test_writes_exactly_the_given_slots_of_one_layer(count: int) -> None:
    whole = torch.zeros(4, 3, 5, 2)  # pages, layers, page size, width: one layer is strided
    slots = torch.randperm(20)[:count]
    latents = torch.randn(count, 2) + 10
    kv_write(whole[:, 1], slots, latents)
    assert torch.equal(whole[:, 1].reshape(20, 2)[slots], latents)
    assert int((whole != 0).sum()) == 2 * count
