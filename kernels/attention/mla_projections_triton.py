"""Triton kernels of `mla_projections.py`: one small product per head, and rotary keys per head."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import pdl


@triton.jit
def head_product(
    x_lines, inside, weight, weight_strides, out_lines, out_ids, num_in, num_out,
    IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute the outputs out_ids of one head for some tokens.

    x_lines, out_lines [n] point to the inputs and outputs of the tokens, `weight` to the weights
    [num_in, num_out] of the head.
    """
    in_ids = tl.arange(0, IN)
    is_in = in_ids < num_in
    is_out = out_ids < num_out
    w = tl.load(
        weight + in_ids[:, None] * weight_strides[1] + out_ids[None, :] * weight_strides[2],
        mask=is_in[:, None] & is_out[None, :],
        other=0.0,
    )
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    a = tl.load(
        x_lines[:, None] + in_ids[None, :], mask=inside[:, None] & is_in[None, :], other=0.0
    )
    result = tl.dot(a, w).to(out_lines.dtype.element_ty)
    tl.store(out_lines[:, None] + out_ids[None, :], result, mask=inside[:, None] & is_out[None, :])


@triton.jit(do_not_specialize=("num_tokens",))
def _head_product_kernel(
    x,
    weight,
    out,
    num_tokens,
    num_in,
    num_out,
    num_tail,
    x_token_stride,
    x_head_stride,
    weight_strides,
    out_token_stride,
    out_head_stride,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TAIL: tl.constexpr,
    PDL: tl.constexpr,
):
    """OUT outputs of a head for ROWS tokens. Programs after those of the last output copy the tail
    of x, which follows its num_in inputs, to after the outputs."""
    head = tl.program_id(0)
    first = tl.program_id(1) * OUT
    rows = (tl.program_id(2) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < num_tokens
    x_lines = x + rows * x_token_stride + head * x_head_stride
    out_lines = out + rows * out_token_stride + head * out_head_stride
    if first < num_out:
        out_ids = first + tl.arange(0, OUT)
        w_head = weight + head.to(tl.int64) * weight_strides[0]
        head_product(x_lines, inside, w_head, weight_strides, out_lines, out_ids,
                     num_in, num_out, IN, PDL)  # fmt: skip
    else:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        tail_ids = tl.arange(0, TAIL)
        mask = inside[:, None] & (tail_ids < num_tail)[None, :]
        tail = tl.load(x_lines[:, None] + num_in + tail_ids[None, :], mask=mask, other=0.0)
        tl.store(out_lines[:, None] + num_out + tail_ids[None, :], tail, mask=mask)


def product_tile(num_tokens: int, weight: Tensor) -> tuple[int, int]:
    """Tokens and outputs of a program of `head_product`; weight [heads, in, out], strided."""
    return min(64, max(16, triton.next_power_of_2(num_tokens))), 64 if weight.stride(2) == 1 else 32


def launch_head_product(
    x: Tensor, weight: Tensor, num_tail: int, out: Tensor | None = None
) -> Tensor:
    """Multiply each head's part of x by its weight, and copy the tail of x.

    x [num_tokens, heads, in + num_tail], strided over tokens and heads
    weight [heads, in, out], strided, of the type of x
    -> [num_tokens, heads, out + num_tail], contiguous; in `out` if given, which may be strided over
    tokens and heads.
    """
    num_tokens, heads, _ = x.shape
    _, num_in, num_out = weight.shape
    if out is None:
        out = torch.empty(num_tokens, heads, num_out + num_tail, dtype=x.dtype, device=x.device)
    if not num_tokens:
        return out
    rows, columns = product_tile(num_tokens, weight)
    blocks = -(-num_out // columns)
    _head_product_kernel[(heads, blocks + bool(num_tail), -(-num_tokens // rows))](
        x,
        weight,
        out,
        num_tokens,
        num_in,
        num_out,
        num_tail,
        x.stride(0),
        x.stride(1),
        weight.stride(),
        out.stride(0),
        out.stride(1),
        ROWS=rows,
        IN=max(16, triton.next_power_of_2(num_in)),
        OUT=columns,
        TAIL=triton.next_power_of_2(max(1, num_tail)),
        num_warps=4,
        **pdl(),
    )
    return out


@triton.jit(do_not_specialize=("num_tokens",))
def _spread_rope_kernel(
    keys,
    latents,
    num_tokens,
    num_heads,
    key_dim,
    rank,
    rope,
    latent_stride,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    ROPE: tl.constexpr,
):
    tokens = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    ids = tl.arange(0, ROPE)
    heads = tl.arange(0, HEADS)
    mask = (tokens < num_tokens)[:, None] & (ids < rope)[None, :]
    tail = tl.load(latents + tokens[:, None] * latent_stride + rank + ids[None, :], mask=mask)
    lines = (tokens[:, None] * num_heads + heads[None, :]) * key_dim + key_dim - rope
    tl.store(
        keys + lines[:, :, None] + ids[None, None, :],
        tl.broadcast_to(tail[:, None, :], [TOKENS, HEADS, ROPE]),
        mask=mask[:, None, :] & (heads < num_heads)[None, :, None],
    )


def launch_spread_rope(keys: Tensor, latents: Tensor, rope: int) -> None:
    """Copy the rotary part of each latent to the end of every head's key.

    keys [num_tokens, heads, dim], contiguous; latents [num_tokens, latent_dim], rows may be
    strided; rope: width of the rotary part, which is the last of a latent.
    """
    num_tokens, heads, dim = keys.shape
    tokens = 4
    _spread_rope_kernel[(-(-num_tokens // tokens),)](
        keys,
        latents,
        num_tokens,
        heads,
        dim,
        latents.shape[1] - rope,
        rope,
        latents.stride(0),
        TOKENS=tokens,
        HEADS=triton.next_power_of_2(heads),
        ROPE=triton.next_power_of_2(rope),
        num_warps=4,
    )
