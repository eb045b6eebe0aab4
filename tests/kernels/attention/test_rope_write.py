"""Rotation, norm and page write together equal the three ops."""

import pytest
import torch
from glimmer.kernels.attention.rope import rope, rope_angles
from glimmer.kernels.attention.rope_write import rope_write
from glimmer.kernels.dense.rms_norm import rms_norm


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("count", [0, 3])
def test_equals_its_parts(count: int, keep: bool, interleave: bool) -> None:
    heads, nope, width, rank = 2, 3, 4, 5
    queries = torch.randn(count, heads, nope + width)
    kv_a = torch.randn(count, rank + width + 2)[:, 2:]
    norm, angles = torch.randn(rank), rope_angles(torch.arange(count) + 7, width, 1e4)
    kv = torch.zeros(3, 2, 4, rank + width)[:, 1]
    slots = torch.randperm(12)[:count]
    turned = rope(queries[..., nope:], *angles, interleave)
    expected = torch.cat(
        (rms_norm(kv_a[:, :rank], norm, 1e-6), rope(kv_a[:, rank:], *angles, interleave)), 1
    )
    plain = queries[..., :nope].clone()
    latents = torch.empty(count, rank + width) if keep else None
    rope_write(queries, kv_a, norm, 1e-6, angles, kv, slots, interleave, latents)
    assert torch.equal(queries, torch.cat((plain, turned), -1))
    assert torch.equal(kv[slots // 4, slots % 4], expected)
    assert int((kv != 0).any(-1).sum()) == count
    assert latents is None or torch.equal(latents, expected)
