"""What lies between the projections and attention: rotate queries and keys, normalise the
compressed KV, write the latents into their pages. One launch on CUDA.
"""

import torch
from torch import Tensor

from ..dense.rms_norm import rms_norm
from .kv_write import kv_write
from .rope import rope


def rope_write(
    queries: Tensor,
    kv_a: Tensor,
    kv_norm: Tensor,
    eps: float,
    angles: tuple[Tensor, Tensor],
    kv: Tensor,
    slots: Tensor,
    interleave: bool,
    latents: Tensor | None = None,
) -> None:
    """Rotates the last part of every query in place and writes the tokens' latents into kv, and
    into `latents` [num_tokens, kv_lora_rank + rope] if that is given.

    queries [num_tokens, heads, nope + rope], contiguous
    kv_a [num_tokens, kv_lora_rank + rope], rows may be strided: compressed KV and key, raw
    kv_norm [kv_lora_rank]; angles: (cos, sin), each [num_tokens, rope / 2] float32, contiguous
    kv [num_pages, page_size, kv_lora_rank + rope] (one layer, may be strided over pages)
    slots [num_tokens] int64, all different: page * page_size + offset
    """
    if queries.is_cuda:
        from .rope_write_triton import launch_rope_write

        launch_rope_write(queries, kv_a, kv_norm, eps, angles, kv, slots, latents, interleave)
        return
    written = rope_write_reference(queries, kv_a, kv_norm, eps, angles, kv, slots, interleave)
    if latents is not None:
        latents.copy_(written)


def rope_write_reference(
    queries: Tensor,
    kv_a: Tensor,
    kv_norm: Tensor,
    eps: float,
    angles: tuple[Tensor, Tensor],
    kv: Tensor,
    slots: Tensor,
    interleave: bool,
) -> Tensor:
    """`rope_write` in plain torch; always returns the latents."""
    width = 2 * angles[0].shape[1]
    rotary = queries[..., -width:]
    rotary.copy_(rope(rotary, *angles, interleave))
    normed = rms_norm(kv_a[:, :-width], kv_norm, eps)
    latents = torch.cat((normed, rope(kv_a[:, -width:], *angles, interleave)), dim=-1)
    kv_write(kv, slots, latents)
    return latents
