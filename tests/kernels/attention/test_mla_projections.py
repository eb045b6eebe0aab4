"""Per-head products: before and after absorbed attention, and up-projected keys and values."""

import pytest
import torch
from glimmer.kernels.attention.mla_projections import absorb_queries, expand_values, up_project

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32


@pytest.mark.parametrize("count", [0, 1, 5])
def test_heads_multiply_by_their_own_weights(count: int) -> None:
    heads, nope, rope, rank, v_dim = 3, 6, 2, 7, 5
    kv_b = torch.randn(heads, nope + v_dim, rank)
    queries, latents = torch.randn(count, heads, nope + rope), torch.randn(count, heads, rank)
    got = absorb_queries(queries, kv_b[:, :nope])
    expected = torch.einsum("thn,hnr->thr", queries[..., :nope], kv_b[:, :nope])
    torch.testing.assert_close(got[..., :rank], expected)
    assert torch.equal(got[..., rank:], queries[..., nope:])
    values = expand_values(latents, kv_b[:, nope:])
    assert values.is_contiguous()
    room = torch.empty_like(values)
    assert expand_values(latents, kv_b[:, nope:], room) is room
    assert torch.equal(room, values)
    torch.testing.assert_close(values, torch.einsum("thr,hvr->thv", latents, kv_b[:, nope:]))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3, 16, 17, 100, 1024, 1025, 3000])
@pytest.mark.parametrize(
    ("heads", "nope", "rope", "rank", "v_dim"), [(20, 192, 64, 512, 256), (5, 32, 16, 48, 40)]
)
def test_on_the_card(count: int, heads: int, nope: int, rope: int, rank: int, v_dim: int) -> None:
    kv_b = (torch.randn(heads, nope + v_dim, rank, device="cuda") / 20).bfloat16()
    queries = torch.randn(count, heads, nope + rope, device="cuda").bfloat16()
    latents = torch.randn(count, heads, rank, device="cuda").bfloat16()
    got = absorb_queries(queries, kv_b[:, :nope])
    expected = absorb_queries(queries.float(), kv_b[:, :nope].float())
    torch.testing.assert_close(got.float(), expected, atol=1e-2, rtol=1e-2)
    values = expand_values(latents, kv_b[:, nope:])
    expected = expand_values(latents.float(), kv_b[:, nope:].float())
    torch.testing.assert_close(values.float(), expected, atol=1e-2, rtol=1e-2)
    room = torch.empty_like(values)
    assert expand_values(latents, kv_b[:, nope:], room) is room
    assert torch.equal(room, values)


def check_up_projection(
    count: int, heads: int, nope: int, rope: int, rank: int, v_dim: int
) -> None:
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
def test_every_head_gets_its_own_keys_and_values(count: int) -> None:
    check_up_projection(count, 3, 6, 2, 5, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 130, 2048])
def test_up_projection_on_the_card(count: int) -> None:
    check_up_projection(count, 20, 192, 64, 512, 256)
