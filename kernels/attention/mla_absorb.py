"""The two small per-head products of absorbed MLA: queries go down into latent space before
attention, its output comes back up to values after it.

q (W_UK c) = (q W_UK) c, and W_UV (p c) = (W_UV c) weighted by p: keys and values are never built.
"""

import torch
from torch import Tensor

# More tokens than that fill cuBLAS's tiles better. On an H100 queries of 256 tokens took 8 us by
# Triton and 20 by cuBLAS, which copied all of them then and now their tail alone; 1,024 is a guess.
# Values of 256 tokens took 14 us by Triton, 6 by cuBLAS.
MAX_QUERIES, _MAX_VALUES = 1024, 64


def absorb_queries(queries: Tensor, w_uk: Tensor) -> Tensor:
    """queries [num_tokens, heads, nope + rope], rotated; w_uk [heads, nope, kv_lora_rank]
    -> [num_tokens, heads, kv_lora_rank + rope]: what meets the cached latents."""
    nope = w_uk.shape[1]
    if suits(queries, MAX_QUERIES):
        from .mla_absorb_triton import launch_head_product

        return launch_head_product(queries, w_uk, queries.shape[2] - nope)
    rank = w_uk.shape[2]
    out = queries.new_empty(*queries.shape[:2], rank + queries.shape[2] - nope)
    torch.bmm(queries[..., :nope].transpose(0, 1), w_uk, out=out[..., :rank].transpose(0, 1))
    out[..., rank:] = queries[..., nope:]
    return out


def expand_values(latent_out: Tensor, w_uv: Tensor, out: Tensor | None = None) -> Tensor:
    """latent_out [num_tokens, heads, kv_lora_rank], w_uv [heads, v_dim, kv_lora_rank]
    -> [num_tokens, heads, v_dim], contiguous: `out` if given."""
    weight = w_uv.transpose(1, 2)
    if suits(latent_out, _MAX_VALUES):
        from .mla_absorb_triton import launch_head_product

        return launch_head_product(latent_out, weight, 0, out)
    if out is None:
        out = latent_out.new_empty(*latent_out.shape[:2], w_uv.shape[1])
    torch.bmm(latent_out.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out


def suits(x: Tensor, most: int) -> bool:
    """Whether x [num_tokens, ...] is for the Triton product per head, whose best is few tokens."""
    return x.is_cuda and x.shape[0] <= most and x.dtype != torch.float32
