"""Keys and values of every head against einsum; on a card with the kernel that spreads tails."""

import pytest
import torch
from glimmer.kernels.attention.up_project import up_project

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32


def check(count: int, heads: int, nope: int, rope: int, rank: int, v_dim: int) -> None:
    latents = torch.randn(count, rank + rope, device=DEVICE).to(DTYPE)
    kv_b = (torch.randn(heads, nope + v_dim, rank, device=DEVICE) * rank**-0.5).to(DTYPE)
    both = torch.einsum("tr,hdr->thd", latents[:, :rank].float(), kv_b.float())
    tails = latents[:, None, rank:].expand(-1, heads, -1).float()
    expected = torch.cat((both[..., :nope], tails), -1), both[..., nope:]
    room = tuple(torch.full_like(part, 9.0, dtype=DTYPE) for part in expected)
    for found in (up_project(latents, kv_b, nope), up_project(latents, kv_b, nope, room)):
        for got, right in zip(found, expected, strict=True):
            assert got.is_contiguous()
            torch.testing.assert_close(got.float(), right, atol=2e-2 if CUDA else 1e-5, rtol=1e-2)
    assert found is room


@pytest.mark.parametrize("count", [0, 1, 7])
def test_every_head_gets_its_own(count: int) -> None:
    check(count, 3, 6, 2, 5, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 130, 2048])
def test_full_size_on_the_card(count: int) -> None:
    check(count, 20, 192, 64, 512, 256)
