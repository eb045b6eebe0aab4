"""The Triton kernel against the reference: the same to a rounding of the last bit."""

import pytest
import torch
from glimmer.kernels.attention.rope import rope_angles
from glimmer.kernels.attention.rope_write import rope_write_reference
from glimmer.kernels.attention.rope_write_triton import launch_rope_write

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32


def check(count: int, heads: int, nope: int, width: int, rank: int, interleave: bool) -> None:
    queries = torch.randn(count, heads, nope + width, device=DEVICE).to(DTYPE)
    kv_a = torch.randn(count, 8 + rank + width, device=DEVICE).to(DTYPE)[:, 8:]
    norm = torch.randn(rank, device=DEVICE).to(DTYPE)
    angles = rope_angles(torch.randint(0, 202752, (count,), device=DEVICE), width, 1e6)
    pages = torch.zeros(-(-count // 8) + 2, 2, 8, rank + width, device=DEVICE, dtype=DTYPE)
    slots = torch.randperm(8 * len(pages), device=DEVICE)[:count]
    wanted, found = (queries.clone(), pages.clone()), (queries, pages)
    args = (kv_a, norm, 1e-6, angles)
    expected = rope_write_reference(wanted[0], *args, wanted[1][:, 1], slots, interleave)
    latents = torch.empty_like(expected)
    launch_rope_write(found[0], *args, found[1][:, 1], slots, latents, interleave)
    step = 2 * torch.finfo(DTYPE).eps
    for got, right in zip((*found, latents), (*wanted, expected), strict=True):
        torch.testing.assert_close(got, right, atol=step, rtol=step)
    untouched = torch.zeros_like(pages)
    launch_rope_write(found[0], *args, untouched[:, 1], slots, None, interleave)
    assert torch.equal(untouched, found[1])


@pytest.mark.parametrize("interleave", [True, False])
def test_matches_the_reference(interleave: bool) -> None:
    check(0, 2, 4, 4, 8, interleave)
    check(3, 5, 12, 4, 24, interleave)
    check(9, 1, 7, 8, 33, interleave)


@pytest.mark.gpu
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("count", [1, 2, 33, 256, 5000])
def test_full_size_on_the_card(count: int, interleave: bool) -> None:
    check(count, 20, 192, 64, 512, interleave)
    check(count, 4, 32, 16, 48, interleave)
