"""Rotary embedding against complex multiplication."""

import cmath

import pytest
import torch
from glimmer.kernels.attention.rope import rope, rope_angles


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("positions", [[], [0], [3, 0, 202751]])
def test_each_pair_turns_by_position_times_frequency(
    positions: list[int], interleave: bool
) -> None:
    dim, theta = 8, 1e4
    x = torch.randn(len(positions), 2, dim)
    cos, sin = rope_angles(torch.tensor(positions, dtype=torch.int64), dim, theta)
    got = rope(x, cos, sin, interleave)
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
    cos, sin = rope_angles(torch.arange(5), 4, 1e4)
    x = torch.randn(5, 4)
    out = rope(x.bfloat16(), cos, sin, True)
    assert (out.shape, out.dtype) == ((5, 4), torch.bfloat16)
    torch.testing.assert_close(out.float(), rope(x, cos, sin, True), atol=3e-2, rtol=0)


def test_score_depends_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 6), torch.randn(1, 6)

    def score(a: int, b: int) -> float:
        angles = [rope_angles(torch.tensor([p]), 6, 1e4) for p in (a, b)]
        return float((rope(q, *angles[0], True) * rope(k, *angles[1], True)).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
