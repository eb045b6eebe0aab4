"""The Triton kernel against the two ops that it is."""

import pytest
import torch
from glimmer.kernels.attention.rope import rope_angles
from glimmer.kernels.attention.rope_absorb_triton import launch_rope_absorb
from glimmer.kernels.attention.rope_write import rope_write_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32


def check(count: int, heads: int, nope: int, width: int, rank: int, interleave: bool) -> None:
    queries = torch.randn(count, heads, nope + width, device=DEVICE).to(DTYPE)
    kv_a = torch.randn(count, 8 + rank + width, device=DEVICE).to(DTYPE)[:, 8:]
    kv_b = torch.randn(heads, nope + 3, rank, device=DEVICE).to(DTYPE) / nope**0.5
    norm, w_uk = torch.randn(rank, device=DEVICE).to(DTYPE), kv_b[:, :nope]
    angles = rope_angles(torch.randint(0, 202752, (count,), device=DEVICE), width, 1e6)
    wanted = torch.zeros(-(-count // 8) + 2, 2, 8, rank + width, device=DEVICE, dtype=DTYPE)
    found = wanted.clone()
    slots = torch.randperm(8 * len(wanted), device=DEVICE)[:count]
    args = (kv_a, norm, 1e-6, angles)
    got = launch_rope_absorb(queries, *args, found[:, 1], slots, interleave, w_uk)
    rope_write_reference(queries, *args, wanted[:, 1], slots, interleave)
    step = 2 * torch.finfo(DTYPE).eps
    torch.testing.assert_close(found, wanted, atol=step, rtol=step)
    torch.testing.assert_close(got[..., rank:], queries[..., nope:], atol=step, rtol=step)
    product = torch.einsum("the,heo->tho", queries[..., :nope].float(), w_uk.float())
    tolerance = 2e-2 if CUDA else 1e-4
    torch.testing.assert_close(got[..., :rank].float(), product, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("interleave", [True, False])
def test_matches_the_two_ops(interleave: bool) -> None:
    check(0, 2, 4, 4, 8, interleave)
    check(3, 5, 12, 4, 24, interleave)
    check(70, 3, 7, 8, 33, interleave)  # several blocks of tokens, more tokens than heads


@pytest.mark.gpu
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("count", [1, 2, 16, 33, 256, 1024])
def test_full_size_on_the_card(count: int, interleave: bool) -> None:
    check(count, 20, 192, 64, 512, interleave)
    check(count, 2, 32, 16, 48, interleave)
