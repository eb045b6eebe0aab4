"""Triton kernel of `rope_absorb.py`: of each head programs that multiply, one that rotates, and
one that writes some of the tokens' latents."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import pdl
from .mla_absorb_triton import head_product, product_tile
from .rope_write_triton import normed, put, turn


@triton.jit(do_not_specialize=("num_tokens",))
def _rope_absorb_kernel(
    queries, kv_a, norm, cos, sin, slots, kv, weight, out, num_tokens, num_heads, eps, nope, rank,
    half, query_strides, kv_a_stride, kv_strides, weight_strides, out_strides, PAGE: tl.constexpr,
    INTERLEAVE: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    RANK: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    # The two kinds that have most to do one after the other begin first.
    first = (tl.program_id(1) - 2) * OUT
    begin = tl.program_id(2) * ROWS
    rows = (begin + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < num_tokens
    x_lines = queries + rows * query_strides[0] + head * query_strides[1]
    out_lines = out + rows * out_strides[0] + head * out_strides[1]
    pair_ids = tl.arange(0, HALF)[None, :]
    if first >= 0:
        out_ids = first + tl.arange(0, OUT)
        mine = weight + head.to(tl.int64) * weight_strides[0]
        head_product(x_lines, inside, mine, weight_strides, out_lines, out_ids,
                     nope, rank, IN, PDL)  # fmt: skip
    elif tl.program_id(1) == 1:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        at = rows[:, None] * half + pair_ids
        mask = inside[:, None] & (pair_ids < half)
        c = tl.load(cos + at, mask=mask, other=0.0)
        s = tl.load(sin + at, mask=mask, other=0.0)
        a, b = turn(x_lines + nope, inside, c, s, half, INTERLEAVE, HALF)
        put(out_lines + rank, inside, a, b, half, INTERLEAVE, HALF)
    else:
        ids = tl.arange(0, RANK)
        one = tl.arange(0, 1)
        scale = tl.load(norm + ids, mask=ids < rank, other=0.0)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        for token in range(begin + head, tl.minimum(begin + ROWS, num_tokens), num_heads):
            at = tl.cast(token, tl.int64) * half + pair_ids
            c = tl.load(cos + at, mask=pair_ids < half, other=0.0)
            s = tl.load(sin + at, mask=pair_ids < half, other=0.0)
            slot = tl.load(slots + token)
            line = kv_a + tl.cast(token, tl.int64) * kv_a_stride
            value = normed(line, ids, ids < rank, scale, rank, eps)
            a, b = turn(line + rank + one, one == 0, c, s, half, INTERLEAVE, HALF)
            target = kv + slot // PAGE * kv_strides[0] + slot % PAGE * kv_strides[1]
            tl.store(target + ids, value, mask=ids < rank)
            put(target + rank + one, one == 0, a, b, half, INTERLEAVE, HALF)


def launch_rope_absorb(
    queries: Tensor,
    kv_a: Tensor,
    kv_norm: Tensor,
    eps: float,
    angles: tuple[Tensor, Tensor],
    kv: Tensor,
    slots: Tensor,
    interleave: bool,
    w_uk: Tensor,
) -> Tensor:
    """`rope_absorb`; leaves `queries` as they are."""
    num_tokens, num_heads, _ = queries.shape
    _, nope, rank = w_uk.shape
    cos, sin = angles
    half = cos.shape[1]
    out = torch.empty(
        num_tokens, num_heads, rank + 2 * half, dtype=queries.dtype, device=queries.device
    )
    if not num_tokens:
        return out
    rows, columns = product_tile(num_tokens, w_uk)
    _rope_absorb_kernel[(num_heads, 2 + -(-rank // columns), -(-num_tokens // rows))](
        queries, kv_a, kv_norm, cos, sin, slots, kv, w_uk, out, num_tokens, num_heads, eps, nope,
        rank, half, queries.stride()[:2], kv_a.stride(0), kv.stride()[:2], w_uk.stride(),
        out.stride()[:2], PAGE=kv.shape[1], INTERLEAVE=interleave, ROWS=rows,
        IN=max(16, triton.next_power_of_2(nope)), OUT=columns, RANK=triton.next_power_of_2(rank),
        HALF=triton.next_power_of_2(half), num_warps=4, **pdl(),
    )  # fmt: skip
    return out
