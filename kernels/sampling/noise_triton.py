"""Triton kernel of `uniform`. Arithmetic of int64 wraps here as it does in torch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_MIX_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def _shift(x, COUNT: tl.constexpr):
    """Logical shift right of a signed number."""
    return (x >> COUNT) & ((1 << (64 - COUNT)) - 1)


@triton.jit
def _mix(x):
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


@triton.jit(do_not_specialize=("count",), do_not_specialize_on_alignment=("positions",))
def _uniform_kernel(seeds, positions, rows, out, count, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    source = tl.load(rows + at, mask=inside, other=0) if GATHER else at
    seed = tl.load(seeds + source, mask=inside, other=0)
    position = tl.load(positions + at, mask=inside, other=0)
    bits = _mix(_mix(seed + _GAMMA) + (position + 1) * _GAMMA)
    tl.store(out + at, _shift(bits, 11).to(tl.float64) * 1.1102230246251565e-16, mask=inside)


def launch_uniform(seeds: Tensor, positions: Tensor, rows: Tensor | None) -> Tensor:
    """Arguments as for `uniform`."""
    count = len(positions)
    out = torch.empty(count, dtype=torch.float64, device=seeds.device)
    if count:
        grid = (triton.cdiv(count, 128),)
        _uniform_kernel[grid](
            seeds, positions, seeds if rows is None else rows, out, count,
            GATHER=rows is not None, BLOCK=128, num_warps=4,
        )  # fmt: skip
    return out
