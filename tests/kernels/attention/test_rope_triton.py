"""The Triton kernels of `rope_write` and `rope_absorb` against the reference, within a rounding of
the last bit."""

import pytest
import torch
from glimmer.kernels.attention.rope import rope_angles, rope_write_reference
from glimmer.kernels.attention.rope_triton import launch_rope_absorb, launch_rope_write

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32


def check_write(count: int, heads: int, nope: int, width: int, rank: int, interleave: bool) -> None:
    queries = torch.randn(count, heads, nope + width, device=DEVICE).to(DTYPE)
    kv_a = torch.randn(count, 8 + rank + width, device=DEVICE).to(DTYPE)[:, 8:]
    norm = torch.randn(rank, device=DEVICE).to(DTYPE)
    angles = rope_angles(torch.randint(0, 202752, (count,), device=DEVICE), width, 1e6, interleave)
    pages = torch.zeros(-(-count // 8) + 2, 2, 8, rank + width, device=DEVICE, dtype=DTYPE)
    slots = torch.randperm(8 * len(pages), device=DEVICE)[:count]
    wanted, found = (queries.clone(), pages.clone()), (queries, pages)
    args = (kv_a, norm, 1e-6, angles)
    expected = rope_write_reference(wanted[0], *args, wanted[1][:, 1], slots)
    latents = torch.empty_like(expected)
    launch_rope_write(found[0], *args, found[1][:, 1], slots, latents)
    step = 2 * torch.finfo(DTYPE).eps
    for got, right in zip((*found, latents), (*wanted, expected), strict=True):
        torch.testing.assert_close(got, right, atol=step, rtol=step)
    untouched = torch.zeros_like(pages)
    launch_rope_write(found[0], *args, untouched[:, 1], slots, None)
    assert torch.equal(untouched, found[1])


@pytest.mark.parametrize("interleave", [True, False])
def test_rope_write_matches_the_reference(interleave: bool) -> None:
    check_write(0, 2, 4, 4, 8, interleave)
    check_write(3, 5, 12, 4, 24, interleave)
    check_write(9, 1, 7, 8, 33, interleave)


@pytest.mark.gpu
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("count", [1, 2, 33, 256, 5000])
def test_rope_write_on_the_card(count: int, interleave: bool) -> None:
    check_write(count, 20, 192, 64, 512, interleave)
    check_write(count, 4, 32, 16, 48, interleave)


def check_absorb(
    count: int, heads: int, nope: int, width: int, rank: int, interleave: bool
) -> None:
    queries = torch.randn(count, heads, nope + width, device=DEVICE).to(DTYPE)
    kv_a = torch.randn(count, 8 + rank + width, device=DEVICE).to(DTYPE)[:, 8:]
    kv_b = torch.randn(heads, nope + 3, rank, device=DEVICE).to(DTYPE) / nope**0.5
    norm, w_uk = torch.randn(rank, device=DEVICE).to(DTYPE), kv_b[:, :nope]
    angles = rope_angles(torch.randint(0, 202752, (count,), device=DEVICE), width, 1e6, interleave)
    wanted = torch.zeros(-(-count // 8) + 2, 2, 8, rank + width, device=DEVICE, dtype=DTYPE)
    found = wanted.clone()
    slots = torch.randperm(8 * len(wanted), device=DEVICE)[:count]
    args = (kv_a, norm, 1e-6, angles)
    got = launch_rope_absorb(queries, *args, found[:, 1], slots, w_uk)
    rope_write_reference(queries, *args, wanted[:, 1], slots)
    step = 2 * torch.finfo(DTYPE).eps
    torch.testing.assert_close(found, wanted, atol=step, rtol=step)
    torch.testing.assert_close(got[..., rank:], queries[..., nope:], atol=step, rtol=step)
    product = torch.einsum("the,heo->tho", queries[..., :nope].float(), w_uk.float())
    tolerance = 2e-2 if CUDA else 1e-4
    torch.testing.assert_close(got[..., :rank].float(), product, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("interleave", [True, False])
def test_rope_absorb_matches_the_two_ops(interleave: bool) -> None:
    check_absorb(0, 2, 4, 4, 8, interleave)
    check_absorb(3, 5, 12, 4, 24, interleave)
    if interleave:
        check_absorb(70, 3, 7, 8, 33, interleave)  # several blocks of tokens, more than heads


@pytest.mark.gpu
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("count", [1, 2, 16, 33, 256, 1024])
def test_rope_absorb_on_the_card(count: int, interleave: bool) -> None:
    check_absorb(count, 20, 192, 64, 512, interleave)
    check_absorb(count, 2, 32, 16, 48, interleave)
