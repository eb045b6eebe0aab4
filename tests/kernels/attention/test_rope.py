"""Rotary embedding against complex multiplication, and the ops between projections and attention
against their parts."""

import cmath

import pytest
import torch
from glimmer.kernels.attention.mla_projections import absorb_queries
from glimmer.kernels.attention.rope import (
    rope,
    rope_absorb,
    rope_angles,
    rope_write,
    rope_write_reference,
)
from glimmer.kernels.dense.linear import rms_norm


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("positions", [[], [0], [3, 0, 202751]])
def test_each_pair_turns_by_position_times_frequency(
    positions: list[int], interleave: bool
) -> None:
    dim, theta = 8, 1e4
    x = torch.randn(len(positions), 2, dim)
    at = torch.tensor(positions, dtype=torch.int64)
    got = rope(x, rope_angles(at, dim, theta, interleave))
    for t, position in enumerate(positions):
        for head in range(2):
            for i in range(dim // 2):
                a, b = (2 * i, 2 * i + 1) if interleave else (i, i + dim // 2)
                turn = cmath.exp(1j * position * theta ** (-2 * i / dim))
                z = complex(x[t, head, a], x[t, head, b]) * turn
                # float32 angles at position 2e5 are good to about 2e5 * 2^-24
                assert complex(got[t, head, a], got[t, head, b]) == pytest.approx(z, abs=5e-2)
                if position < 10:
                    assert complex(got[t, head, a], got[t, head, b]) == pytest.approx(z, abs=1e-5)


def test_keys_without_heads_and_low_precision_keep_shape_and_type() -> None:
    angles = rope_angles(torch.arange(5), 4, 1e4, True)
    x = torch.randn(5, 4)
    out = rope(x.bfloat16(), angles)
    assert (out.shape, out.dtype) == ((5, 4), torch.bfloat16)
    torch.testing.assert_close(out.float(), rope(x, angles), atol=3e-2, rtol=0)


def test_score_depends_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 6), torch.randn(1, 6)

    def score(a: int, b: int) -> float:
        angles = [rope_angles(torch.tensor([p]), 6, 1e4, True) for p in (a, b)]
        return float((rope(q, angles[0]) * rope(k, angles[1])).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_rope_write_equals_its_parts(count: int, keep: bool, interleave: bool) -> None:
    heads, nope, width, rank = 2, 3, 4, 5
    queries = torch.randn(count, heads, nope + width)
    kv_a = torch.randn(count, rank + width + 2)[:, 2:]
    norm, angles = torch.randn(rank), rope_angles(torch.arange(count) + 7, width, 1e4, interleave)
    whole = torch.zeros(3, 2, 4, rank + width)  # pages, layers, page size: one layer is strided
    kv, slots = whole[:, 1], torch.randperm(12)[:count]
    turned = rope(queries[..., nope:], angles)
    expected = torch.cat((rms_norm(kv_a[:, :rank], norm, 1e-6), rope(kv_a[:, rank:], angles)), 1)
    plain = queries[..., :nope].clone()
    latents = torch.empty(count, rank + width) if keep else None
    rope_write(queries, kv_a, norm, 1e-6, angles, kv, slots, latents)
    assert torch.equal(queries, torch.cat((plain, turned), -1))
    assert torch.equal(kv[slots // 4, slots % 4], expected)
    assert int((whole != 0).any(-1).sum()) == count
    assert latents is None or torch.equal(latents, expected)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_rope_absorb_is_rotation_and_then_absorption(count: int, interleave: bool) -> None:
    heads, nope, width, rank = 2, 3, 4, 5
    queries, w_uk = torch.randn(count, heads, nope + width), torch.randn(heads, nope, rank)
    kv_a, norm = torch.randn(count, rank + width), torch.randn(rank)
    angles = rope_angles(torch.arange(count) + 7, width, 1e4, interleave)
    args = (kv_a, norm, 1e-6, angles)
    wanted, found = torch.zeros(3, 4, rank + width), torch.zeros(3, 4, rank + width)
    slots = torch.randperm(12)[:count]
    turned = queries.clone()
    rope_write_reference(turned, *args, wanted, slots)
    got = rope_absorb(queries, *args, found, slots, w_uk)
    assert torch.equal(got, absorb_queries(turned, w_uk))
    assert torch.equal(found, wanted)
