"""The per-head products of MLA with the two halves of its up-projection, W_UK and W_UV.

A head's key without its rotary part is W_UK c and its value is W_UV c, where c is the compressed KV
of a token. Up-projected attention computes them (`up_project`). Absorbed attention never does: its
scores are q (W_UK c) = (q W_UK) c (`absorb_queries`), and its output is W_UV applied to the
weighted sum of the c (`expand_values`). Formulas: DeepSeek-V2, https://arxiv.org/abs/2405.04434,
section 2.1.
"""

import torch
from torch import Tensor

# The Triton product is used up to so many tokens; more fill the tiles of cuBLAS better. On an H100
# the queries of 256 tokens took 8 us by Triton and 20 us by cuBLAS, at a time when that path copied
# whole queries. Now it copies their rotary part only, so 1,024 is an estimate. The values of 256
# tokens took 14 us by Triton and 6 us by cuBLAS.
MAX_QUERIES, _MAX_VALUES = 1024, 64


def absorb_queries(queries: Tensor, w_uk: Tensor) -> Tensor:
    """Move queries into latent space, where they meet the cached latents directly.

    queries [num_tokens, heads, nope + rope], rotated, any strides over tokens and heads
    w_uk [heads, nope, kv_lora_rank], of the type of queries
    -> [num_tokens, heads, kv_lora_rank + rope], contiguous; the rotary part is copied.
    """
    nope = w_uk.shape[1]
    if is_for_triton(queries, MAX_QUERIES):
        from .mla_projections_triton import launch_head_product

        return launch_head_product(queries, w_uk, queries.shape[2] - nope)
    rank = w_uk.shape[2]
    out = queries.new_empty(*queries.shape[:2], rank + queries.shape[2] - nope)
    torch.bmm(queries[..., :nope].transpose(0, 1), w_uk, out=out[..., :rank].transpose(0, 1))
    out[..., rank:] = queries[..., nope:]
    return out


def expand_values(latent_out: Tensor, w_uv: Tensor, out: Tensor | None = None) -> Tensor:
    """Turn the output of absorbed attention into values.

    latent_out [num_tokens, heads, kv_lora_rank]; w_uv [heads, v_dim, kv_lora_rank], of its type
    -> [num_tokens, heads, v_dim], contiguous, in `out` if given.
    """
    weight = w_uv.transpose(1, 2)
    if is_for_triton(latent_out, _MAX_VALUES):
        from .mla_projections_triton import launch_head_product

        return launch_head_product(latent_out, weight, 0, out)
    if out is None:
        out = latent_out.new_empty(*latent_out.shape[:2], w_uv.shape[1])
    torch.bmm(latent_out.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out


def is_for_triton(x: Tensor, max_tokens: int) -> bool:
    """Whether the Triton product per head takes x [num_tokens, ...]."""
    return x.is_cuda and x.shape[0] <= max_tokens and x.dtype != torch.float32


def up_project(
    latents: Tensor, kv_b: Tensor, nope: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the keys and values of every head from the latents.

    latents [num_tokens, kv_lora_rank + rope], rows may be strided
    kv_b [heads, nope + v_dim, kv_lora_rank], of the type of latents: W_UK over W_UV
    -> (keys [num_tokens, heads, nope + rope], whose rotary part is the same for all heads, values
    [num_tokens, heads, v_dim]), contiguous, in `out` if given. Every element is written once.
    """
    heads, both, rank = kv_b.shape
    rope = latents.shape[1] - rank
    if out is None:
        keys = latents.new_empty(len(latents), heads, nope + rope)
        out = keys, latents.new_empty(len(latents), heads, both - nope)
    keys, values = out
    shared = latents[:, :rank].expand(heads, -1, -1)
    weights = kv_b.transpose(1, 2)
    torch.bmm(shared, weights[..., :nope], out=keys.transpose(0, 1)[..., :nope])
    torch.bmm(shared, weights[..., nope:], out=values.transpose(0, 1))
    if latents.is_cuda:
        from .mla_projections_triton import launch_spread_rope

        launch_spread_rope(keys, latents, rope)
    else:
        keys[..., nope:] = latents[:, None, rank:]
    return out
