"""Triton kernels of `linear.py`: matrix products with few rows of x, bound by reading the weight.

`linear_one` computes each row of x by itself, as a matrix-vector product. `linear_few` uses the
tensor cores, with the rows of the weight as the tall side, for up to 64 rows of x. It cuts the
inner dimension into slices; a program multiplies its slices side by side and adds them up itself.
So narrow layers keep the whole GPU busy without partial results in memory.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import pdl

# Weights with at most so many rows and elements are faster with `linear_few` than with cuBLAS.
_FEW_ROWS, _FEW_SIZE = 2048, 1 << 24


@triton.jit
def _one_kernel(
    x, norm, weight, out, x_stride, n, eps, K: tl.constexpr, ROW: tl.constexpr, NORM: tl.constexpr,
    ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one token. NORM: of the RMS norm of x, which every program computes."""
    token = tl.program_id(0).to(tl.int64)  # neighbouring programs read the same weights
    x += token * x_stride
    out += token * n
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = weight + rows[:, None].to(tl.int64) * K + k[None, :]
    inside = rows[:, None] < n
    w = tl.load(at, mask=inside & (k[None, :] < K), other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    old = tl.zeros((BLOCK_N,), tl.float32)
    if ADD:  # loaded here, so that the latency overlaps with that of the other loads
        old += tl.load(out + rows, mask=rows < n, other=0.0).to(tl.float32)
    if NORM:
        whole = tl.arange(0, ROW)
        wide = tl.load(x + whole, mask=whole < K, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for begin in tl.static_range(0, K, BLOCK_K):
        if begin > 0:
            w = tl.load(at + begin, mask=inside & (begin + k[None, :] < K), other=0.0)
        part = tl.load(x + begin + k, mask=begin + k < K, other=0.0)
        if NORM:
            gain = tl.load(norm + begin + k, mask=begin + k < K, other=0.0).to(tl.float32)
            normed = (part.to(tl.float32) * inverse).to(part.dtype)  # rounded as `rms_norm` does
            part = (normed.to(tl.float32) * gain).to(part.dtype)
        total += w.to(tl.float32) * part.to(tl.float32)[None, :]
    tl.store(out + rows, old + tl.sum(total, 1), mask=rows < n)


@triton.jit
def _few_kernel(
    x, weight, out, num_tokens, n, k_size, x_stride, ADD: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_T)
    k = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    w_at = weight + rows[None, :, None].to(tl.int64) * k_size + k[:, None, :]
    x_at = x + tokens[None, None, :] * x_stride + k[:, :, None]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((SLICES, BLOCK_N, BLOCK_T), tl.float32)
    for begin in range(0, k_size, SLICES * BLOCK_K):
        inside = begin + k < k_size
        w = tl.load(w_at + begin, mask=inside[:, None, :] & (rows[None, :, None] < n), other=0.0)
        part = tl.load(
            x_at + begin, mask=inside[:, :, None] & (tokens[None, None, :] < num_tokens), other=0.0
        )
        acc = tl.dot(w, part, acc)
    total = tl.sum(acc, 0)
    at = out + tokens[None, :] * n + rows[:, None]
    mask = (tokens[None, :] < num_tokens) & (rows[:, None] < n)
    if ADD:
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, total, mask=mask)


def one_tile(k_size: int) -> tuple[int, ...]:
    """Rows, columns and warps of the tile of `linear_one` where none was measured."""
    return 4, min(2048, max(16, triton.next_power_of_2(k_size) // 2)), 4


def norm_tile(k_size: int) -> tuple[int, ...]:
    """The same with a norm: fewer and larger programs, because each of them computes it. The
    fastest of those timed on an H100, for 1344 rows of 2048 elements and for 5120 rows of 768."""
    return (8, 2048, 8) if k_size > 1024 else (16, 512, 8)


def few_tile(n: int, k_size: int) -> tuple[int, ...]:
    """Slices, rows, columns of a slice and stages of the tile of `linear_few` where none was
    measured; empty for wide and large weights, with which cuBLAS is faster."""
    if n > min(_FEW_ROWS, k_size) or n * k_size > _FEW_SIZE:
        return ()
    return min(4, max(1, triton.next_power_of_2(k_size) // 64)), 16, 64, 4


def linear_one(
    x: Tensor,
    weight: Tensor,
    config: tuple[int, ...],
    out: Tensor | None = None,
    add_to: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`linear` of each token by itself. config: rows, columns and warps of a tile. With `norm` [k]
    and `eps`: `norm_linear`. Other arguments as for `linear`."""
    n, k_size = weight.shape
    if add_to is not None:
        out = add_to
    elif out is None:
        out = x.new_empty(len(x), n)
    rows, columns, warps = config
    _one_kernel[(len(x), triton.cdiv(n, rows))](
        x, x if norm is None else norm, weight, out, x.stride(0), n, eps, K=k_size,
        ROW=triton.next_power_of_2(k_size), NORM=norm is not None, ADD=add_to is not None,
        BLOCK_N=rows, BLOCK_K=min(columns, triton.next_power_of_2(k_size)), num_warps=warps,
        **pdl(),
    )  # fmt: skip
    return out


def linear_few(
    x: Tensor,
    weight: Tensor,
    config: tuple[int, ...],
    out: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """`linear` of up to 64 tokens. config: slices, rows, columns of a slice and stages of a tile; a
    program has as many warps as slices. The tile (8, 16, 64, 4) does not fit the shared memory of
    an H100 from 33 tokens on. Other arguments as for `linear`."""
    n, k_size = weight.shape
    if add_to is not None:
        out = add_to
    elif out is None:
        out = x.new_empty(len(x), n)
    slices, rows, columns, stages = config
    _few_kernel[(triton.cdiv(n, rows),)](
        x, weight, out, len(x), n, k_size, x.stride(0), ADD=add_to is not None, SLICES=slices,
        BLOCK_N=rows, BLOCK_T=max(16, triton.next_power_of_2(len(x))), BLOCK_K=columns,
        num_warps=slices, num_stages=stages, **pdl(),
    )  # fmt: skip
    return out
