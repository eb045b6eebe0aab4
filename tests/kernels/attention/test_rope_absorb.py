"""One op in place of two."""

import pytest
import torch
from glimmer.kernels.attention.mla_absorb import absorb_queries
from glimmer.kernels.attention.rope import rope_angles
from glimmer.kernels.attention.rope_absorb import rope_absorb
from glimmer.kernels.attention.rope_write import rope_write_reference


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_is_rotation_and_then_absorption(count: int, interleave: bool) -> None:
    heads, nope, width, rank = 2, 3, 4, 5
    queries, w_uk = torch.randn(count, heads, nope + width), torch.randn(heads, nope, rank)
    kv_a, norm = torch.randn(count, rank + width), torch.randn(rank)
    angles = rope_angles(torch.arange(count) + 7, width, 1e4)
    args = (kv_a, norm, 1e-6, angles)
    wanted, found = torch.zeros(3, 4, rank + width), torch.zeros(3, 4, rank + width)
    slots = torch.randperm(12)[:count]
    turned = queries.clone()
    rope_write_reference(turned, *args, wanted, slots, interleave)
    got = rope_absorb(queries, *args, found, slots, interleave, w_uk)
    assert torch.equal(got, absorb_queries(turned, w_uk))
    assert torch.equal(found, wanted)
