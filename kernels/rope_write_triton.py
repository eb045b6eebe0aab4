"""Triton kernel of `rope_write.py`: one program per token."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import pdl


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
    query_token_stride,
    query_head_stride,
    kv_a_stride,
    kv_page_stride,
    kv_token_stride,
    latent_stride,
    PAGE: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    KEEP: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    rank_ids = tl.arange(0, RANK)
    pair_ids = tl.arange(0, HALF)
    is_rank = rank_ids < rank
    is_pair = pair_ids < half
    scale = tl.load(norm + rank_ids, mask=is_rank, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    c = tl.load(cos + token * half + pair_ids, mask=is_pair, other=0.0)
    s = tl.load(sin + token * half + pair_ids, mask=is_pair, other=0.0)
    slot = tl.load(slots + token)
    if INTERLEAVE:
        first_ids, second_ids = 2 * pair_ids, 2 * pair_ids + 1
    else:
        first_ids, second_ids = pair_ids, pair_ids + half

    line = kv_a + token * kv_a_stride
    value = tl.load(line + rank_ids, mask=is_rank, other=0.0).to(tl.float32)
    a = tl.load(line + rank + first_ids, mask=is_pair, other=0.0).to(tl.float32)
    b = tl.load(line + rank + second_ids, mask=is_pair, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / rank + eps)
    rounded = value.to(kv.dtype.element_ty).to(tl.float32)  # before the weight, as in training
    value = (rounded * scale.to(tl.float32)).to(kv.dtype.element_ty)
    turned_a = (a * c - b * s).to(kv.dtype.element_ty)
    turned_b = (b * c + a * s).to(kv.dtype.element_ty)
    target = kv + slot // PAGE * kv_page_stride + slot % PAGE * kv_token_stride
    tl.store(target + rank_ids, value, mask=is_rank)
    tl.store(target + rank + first_ids, turned_a, mask=is_pair)
    tl.store(target + rank + second_ids, turned_b, mask=is_pair)
    if KEEP:
        target = latents + token * latent_stride
        tl.store(target + rank_ids, value, mask=is_rank)
        tl.store(target + rank + first_ids, turned_a, mask=is_pair)
        tl.store(target + rank + second_ids, turned_b, mask=is_pair)

    heads = tl.arange(0, HEADS)
    place = (heads < num_heads)[:, None] & is_pair[None, :]
    lines = queries + token * query_token_stride + heads[:, None] * query_head_stride + nope
    a = tl.load(lines + first_ids[None, :], mask=place, other=0.0).to(tl.float32)
    b = tl.load(lines + second_ids[None, :], mask=place, other=0.0).to(tl.float32)
    turned_a = (a * c[None, :] - b * s[None, :]).to(queries.dtype.element_ty)
    turned_b = (b * c[None, :] + a * s[None, :]).to(queries.dtype.element_ty)
    tl.store(lines + first_ids[None, :], turned_a, mask=place)
    tl.store(lines + second_ids[None, :], turned_b, mask=place)


def launch_rope_write(
    queries: Tensor,
    kv_a: Tensor,
    kv_norm: Tensor,
    eps: float,
    angles: tuple[Tensor, Tensor],
    kv: Tensor,
    slots: Tensor,
    latents: Tensor | None,
    interleave: bool,
) -> None:
    """`rope_write` into `latents` [num_tokens, latent_dim] as well, unless None."""
    num_tokens, num_heads, dim = queries.shape
    if not num_tokens:
        return
    cos, sin = angles
    half, rank = cos.shape[1], len(kv_norm)
    _rope_write_kernel[(num_tokens,)](
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
        queries.stride(0),
        queries.stride(1),
        kv_a.stride(0),
        kv.stride(0),
        kv.stride(1),
        0 if latents is None else latents.stride(0),
        PAGE=kv.shape[1],
        INTERLEAVE=interleave,
        KEEP=latents is not None,
        HEADS=triton.next_power_of_2(num_heads),
        RANK=triton.next_power_of_2(rank),
        HALF=triton.next_power_of_2(half),
        num_warps=4,
        **pdl(),
    )
