"""Per-head products before and after absorbed attention."""

import pytest
import torch
from glimmer.kernels.attention.mla_absorb import absorb_queries, expand_values


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
