"""Triton kernels of `rope.py`: `rope_write` and `rope_absorb`, one launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import pdl
from .mla_projections_triton import head_product, product_tile
from .rope import RopeAngles


@triton.jit
def turn(line, is_line, c, s, half, INTERLEAVE: tl.constexpr, HALF: tl.constexpr):
    """Rotate vectors of width 2 * half that begin at line [n], where is_line [n].

    c, s [1 or n, HALF]: cosines and sines
    -> first and second elements of the pairs [n, HALF], in the type of the vectors.
    """
    pair_ids = tl.arange(0, HALF)
    is_pair = is_line[:, None] & (pair_ids < half)[None, :]
    if INTERLEAVE:  # one wide read, then taken apart
        ids = tl.arange(0, 2 * HALF)
        mask = is_line[:, None] & (ids < 2 * half)[None, :]
        both = tl.load(line[:, None] + ids[None, :], mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(both, (both.shape[0], HALF, 2)))
    else:
        a = tl.load(line[:, None] + pair_ids[None, :], mask=is_pair, other=0.0)
        b = tl.load(line[:, None] + half + pair_ids[None, :], mask=is_pair, other=0.0)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    turned_a = wide_a * c - wide_b * s
    turned_b = wide_b * c + wide_a * s
    return turned_a.to(a.dtype), turned_b.to(b.dtype)


@triton.jit
def put(line, is_line, a, b, half, INTERLEAVE: tl.constexpr, HALF: tl.constexpr):
    """Store the results of `turn` as vectors that begin at line [n], where is_line [n]."""
    if INTERLEAVE:
        ids = tl.arange(0, 2 * HALF)
        mask = is_line[:, None] & (ids < 2 * half)[None, :]
        both = tl.reshape(tl.join(a, b), (a.shape[0], 2 * HALF))
        tl.store(line[:, None] + ids[None, :], both, mask=mask)
    else:
        ids = tl.arange(0, HALF)
        mask = is_line[:, None] & (ids < half)[None, :]
        tl.store(line[:, None] + ids[None, :], a, mask=mask)
        tl.store(line[:, None] + half + ids[None, :], b, mask=mask)


@triton.jit
def normed(line, ids, inside, weight, width, eps):
    """RMS norm of the `width` elements that begin at `line`, in their type."""
    value = tl.load(line + ids, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    rounded = wide.to(value.dtype).to(tl.float32)  # before the weight, as the model was trained
    return (rounded * weight.to(tl.float32)).to(value.dtype)


@triton.jit
def _rope_write_kernel(
    queries,
    kv_a,
    norm,
    cos,
    sin,
    slots,
    kv,
    latents,
    eps,
    num_heads,
    rank,
    half,
    nope,
    query_strides,
    kv_a_stride,
    kv_strides,
    latent_stride,
    PAGE: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    KEEP: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (token, 0) write the latent of a token, programs (token, i) rotate HEADS of its
    queries."""
    token = tl.program_id(0).to(tl.int64)
    rank_ids = tl.arange(0, RANK)
    is_rank = rank_ids < rank
    scale = tl.load(norm + rank_ids, mask=is_rank, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    pair_ids = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + token * half + pair_ids, mask=pair_ids < half, other=0.0)
    s = tl.load(sin + token * half + pair_ids, mask=pair_ids < half, other=0.0)
    if tl.program_id(1) == 0:
        line = kv_a + token * kv_a_stride
        value = normed(line, rank_ids, is_rank, scale, rank, eps)
        single = tl.arange(0, 1)  # `turn` and `put` want a vector of lines
        a, b = turn(line + rank + single, single == 0, c, s, half, INTERLEAVE, HALF)
        slot = tl.load(slots + token)
        target = kv + slot // PAGE * kv_strides[0] + slot % PAGE * kv_strides[1]
        tl.store(target + rank_ids, value, mask=is_rank)
        put(target + rank + single, single == 0, a, b, half, INTERLEAVE, HALF)
        if KEEP:
            target = latents + token * latent_stride
            tl.store(target + rank_ids, value, mask=is_rank)
            put(target + rank + single, single == 0, a, b, half, INTERLEAVE, HALF)
    else:
        heads = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)
        lines = queries + token * query_strides[0] + heads * query_strides[1] + nope
        first, second = turn(lines, heads < num_heads, c, s, half, INTERLEAVE, HALF)
        put(lines, heads < num_heads, first, second, half, INTERLEAVE, HALF)


def launch_rope_write(
    queries: Tensor,
    kv_a: Tensor,
    kv_norm: Tensor,
    eps: float,
    angles: RopeAngles,
    kv: Tensor,
    slots: Tensor,
    latents: Tensor | None,
) -> None:
    """Arguments as for `rope_write`."""
    num_tokens, num_heads, dim = queries.shape
    if not num_tokens:
        return
    cos, sin, interleave = angles
    half, rank = cos.shape[1], len(kv_norm)
    heads = min(32, triton.next_power_of_2(num_heads))  # of a program
    _rope_write_kernel[(num_tokens, 1 + -(-num_heads // heads))](
        queries,
        kv_a,
        kv_norm,
        cos,
        sin,
        slots,
        kv,
        kv if latents is None else latents,
        eps,
        num_heads,
        rank,
        half,
        dim - 2 * half,
        queries.stride()[:2],
        kv_a.stride(0),
        kv.stride()[:2],
        0 if latents is None else latents.stride(0),
        PAGE=kv.shape[1],
        INTERLEAVE=interleave,
        KEEP=latents is not None,
        HEADS=heads,
        RANK=triton.next_power_of_2(rank),
        HALF=triton.next_power_of_2(half),
        num_warps=2,
        **pdl(),
    )


@triton.jit(do_not_specialize=("num_tokens",))
def _rope_absorb_kernel(
    queries, kv_a, norm, cos, sin, slots, kv, weight, out, num_tokens, num_heads, eps, nope, rank,
    half, query_strides, kv_a_stride, kv_strides, weight_strides, out_strides, PAGE: tl.constexpr,
    INTERLEAVE: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    RANK: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (head, i, block) serve ROWS tokens: i = 0 writes latents, every num_heads-th token;
    i = 1 rotates the queries of the head; the others multiply, OUT outputs each."""
    head = tl.program_id(0)
    # The first two kinds have the longest chains of dependent reads, so they begin first.
    first = (tl.program_id(1) - 2) * OUT
    begin = tl.program_id(2) * ROWS
    rows = (begin + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < num_tokens
    x_lines = queries + rows * query_strides[0] + head * query_strides[1]
    out_lines = out + rows * out_strides[0] + head * out_strides[1]
    pair_ids = tl.arange(0, HALF)[None, :]
    if first >= 0:
        out_ids = first + tl.arange(0, OUT)
        w_head = weight + head.to(tl.int64) * weight_strides[0]
        head_product(x_lines, inside, w_head, weight_strides, out_lines, out_ids,
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
        single = tl.arange(0, 1)
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
            a, b = turn(line + rank + single, single == 0, c, s, half, INTERLEAVE, HALF)
            target = kv + slot // PAGE * kv_strides[0] + slot % PAGE * kv_strides[1]
            tl.store(target + ids, value, mask=ids < rank)
            put(target + rank + single, single == 0, a, b, half, INTERLEAVE, HALF)


def launch_rope_absorb(
    queries: Tensor,
    kv_a: Tensor,
    kv_norm: Tensor,
    eps: float,
    angles: RopeAngles,
    kv: Tensor,
    slots: Tensor,
    w_uk: Tensor,
) -> Tensor:
    """Arguments as for `rope_absorb`. Does not change `queries`."""
    num_tokens, num_heads, _ = queries.shape
    _, nope, rank = w_uk.shape
    cos, sin, interleave = angles
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
