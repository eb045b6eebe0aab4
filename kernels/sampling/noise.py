"""Random numbers as a function of (seed, position): the same on every device and in every batch.

Two rounds of splitmix64 (https://prng.di.unimi.it/splitmix64.c), in int64 arithmetic, which wraps.
On CUDA one launch.
"""

import torch
from torch import Tensor


def uniform(seeds: Tensor, positions: Tensor, rows: Tensor | None = None) -> Tensor:
    """One number per pair of seed and position, [n] float64 in [0, 1), with 53 random bits.

    seeds, positions [n] int64, contiguous; with rows [n] int64, `seeds` is a column of the row
    table, and the seeds are seeds[rows].
    """
    if seeds.is_cuda:
        from .noise_triton import launch_uniform

        return launch_uniform(seeds, positions, rows)
    if rows is not None:
        seeds = seeds[rows]
    bits = _mix(_mix(seeds + _GAMMA) + (positions + 1) * _GAMMA)
    return _shift(bits, 11).double() * 2.0**-53


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, count: int) -> Tensor:
    """Logical shift right; torch's own repeats the sign bit."""
    return torch.bitwise_right_shift(x, count) & ((1 << (64 - count)) - 1)
