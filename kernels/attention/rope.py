"""The ops between the projections and attention: rotary embedding, norm of the latent, KV write.

`rope_write` is for up-projected attention; `rope_absorb` also moves the queries into latent space,
for absorbed attention. On CUDA each is one launch (`rope_triton.py`). The rotated vectors keep
their layout, since queries and cached keys agree and nothing else reads them.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..dense.linear import rms_norm
from .mla_projections import MAX_QUERIES, absorb_queries, is_for_triton


class RopeAngles(NamedTuple):
    """Rotary angles of some tokens, the same in all layers of a step.

    `interleave` is the layout of a vector x of width dim: if true, pair i is (x[2i], x[2i + 1]);
    otherwise it is (x[i], x[i + dim / 2]).
    """

    cos: Tensor  # [num_tokens, dim / 2] float32, contiguous
    sin: Tensor  # [num_tokens, dim / 2] float32, contiguous
    interleave: bool


def rope_angles(positions: Tensor, dim: int, theta: float, interleave: bool) -> RopeAngles:
    """Angles of positions [num_tokens] int64: position * theta ** (-2i / dim) for pair i."""
    angles = positions.float()[:, None] * _frequencies(dim, theta, positions.device)
    return RopeAngles(angles.cos(), angles.sin(), interleave)


@cache
def _frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """[dim / 2] float32, in radians per token."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / theta**exponents


def rope(x: Tensor, angles: RopeAngles) -> Tensor:
    """Rotate every vector of x [num_tokens, ..., dim] by the angles of its token.

    Computes in float32; the result has the shape and type of x.
    """
    shape = (x.shape[0], *(1,) * (x.dim() - 2), angles.cos.shape[-1])
    cos = angles.cos.view(shape)
    sin = angles.sin.view(shape)
    wide = x.float()
    if angles.interleave:
        first, second = wide[..., 0::2], wide[..., 1::2]
        pairs = (first * cos - second * sin, second * cos + first * sin)
        return torch.stack(pairs, dim=-1).flatten(-2).to(x.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rope_write(
    queries: Tensor,
    kv_a: Tensor,
    kv_norm: Tensor,
    eps: float,
    angles: RopeAngles,
    kv: Tensor,
    slots: Tensor,
    latents: Tensor | None = None,
) -> None:
    """Rotate the last part of every query in place and write the latents of the tokens to kv.

    queries [num_tokens, heads, nope + rope], contiguous
    kv_a [num_tokens, kv_lora_rank + rope], rows may be strided: the down-projection's output,
        compressed KV before its norm and key before its rotation
    kv_norm [kv_lora_rank], eps: weight and epsilon of the RMS norm of the compressed KV
    kv [num_pages, page_size, kv_lora_rank + rope]: one layer, pages may be strided
    slots [num_tokens] int64, all different: see `paged_rows.py`
    latents [num_tokens, kv_lora_rank + rope], rows may be strided: if given, receives the latents
        as well
    All of one float type.
    """
    if queries.is_cuda:
        from .rope_triton import launch_rope_write

        launch_rope_write(queries, kv_a, kv_norm, eps, angles, kv, slots, latents)
        return
    written = rope_write_reference(queries, kv_a, kv_norm, eps, angles, kv, slots)
    if latents is not None:
        latents.copy_(written)


def rope_write_reference(
    queries: Tensor,
    kv_a: Tensor,
    kv_norm: Tensor,
    eps: float,
    angles: RopeAngles,
    kv: Tensor,
    slots: Tensor,
) -> Tensor:
    """`rope_write` in plain torch; returns the latents."""
    width = 2 * angles.cos.shape[1]
    rotary = queries[..., -width:]
    rotary.copy_(rope(rotary, angles))
    normed = rms_norm(kv_a[:, :-width], kv_norm, eps)
    latents = torch.cat((normed, rope(kv_a[:, -width:], angles)), dim=-1)
    page_size = kv.shape[1]
    kv[slots // page_size, slots % page_size] = latents
    return latents


def rope_absorb(
    queries: Tensor,
    kv_a: Tensor,
    kv_norm: Tensor,
    eps: float,
    angles: RopeAngles,
    kv: Tensor,
    slots: Tensor,
    w_uk: Tensor,
) -> Tensor:
    """`rope_write`, then `absorb_queries`: one launch on CUDA for up to MAX_QUERIES tokens.

    Arguments as for these two -> [num_tokens, heads, kv_lora_rank + rope], contiguous. The
    contents of `queries` are undefined afterwards.
    """
    if is_for_triton(queries, MAX_QUERIES):
        from .rope_triton import launch_rope_absorb

        return launch_rope_absorb(queries, kv_a, kv_norm, eps, angles, kv, slots, w_uk)
    rope_write(queries, kv_a, kv_norm, eps, angles, kv, slots)
    return absorb_queries(queries, w_uk)
