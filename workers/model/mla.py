"""Multi-head latent attention: a token's keys and values are one latent vector, kept in pages.

Two equal ways to attend, chosen per row and step in `inputs.py`: up-projected (heads get their
own keys) and absorbed (queries go down into latent space).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...kernels.kv_write import kv_write
from ...kernels.mla_decode import mla_decode
from ...kernels.mla_prefill import mla_prefill
from ...kernels.rms_norm import rms_norm
from ...kernels.rope import rope
from ...shared.model_spec import ModelSpec
from ..inputs import AttentionGroup, StepInputs
from ..parallel import Ranks

LATENT_NORM_EPS = 1e-6  # of both latent norms; config.json's rms_norm_eps is for the others


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's, this rank's heads only. Float type of the model."""

    qkv_a: Tensor  # [q_lora_rank + latent_dim, hidden]: down-projections of queries and KV
    q_norm: Tensor  # [q_lora_rank]
    q_b: Tensor  # [heads * qk_head_dim, q_lora_rank]
    kv_norm: Tensor  # [kv_lora_rank]
    kv_b: Tensor  # [heads, qk_nope_head_dim + v_head_dim, kv_lora_rank]: W_UK over W_UV
    o: Tensor  # [hidden, heads * v_head_dim]


def attention(
    x: Tensor,
    weights: AttentionWeights,
    inputs: StepInputs,
    angles: tuple[Tensor, Tensor],
    kv: Tensor,
    spec: ModelSpec,
    ranks: Ranks,
) -> Tensor:
    """x [num_tokens, hidden] -> the same shape, summed over ranks. Writes the tokens' latents
    into kv [num_pages, page_size, latent_dim], this layer's pages."""
    q_latent, kv_latent, key_rope = torch.split(
        linear(x, weights.qkv_a),
        [spec.q_lora_rank, spec.kv_lora_rank, spec.qk_rope_head_dim],
        dim=-1,
    )
    queries = linear(rms_norm(q_latent, weights.q_norm, LATENT_NORM_EPS), weights.q_b)
    queries = queries.view(len(x), -1, spec.qk_head_dim)
    nope, rotary = torch.split(queries, [spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=-1)
    rotary = rope(rotary, *angles, spec.rope_interleave)
    latents = torch.cat(
        (
            rms_norm(kv_latent, weights.kv_norm, LATENT_NORM_EPS),
            rope(key_rope, *angles, spec.rope_interleave),
        ),
        dim=-1,
    )
    kv_write(kv, inputs.slots, latents)
    parts = []
    for group in inputs.groups:
        span = group.span
        if group.absorbed:
            parts.append(_absorbed(nope[span], rotary[span], weights.kv_b, kv, group, spec))
        else:
            whole = torch.cat((nope[span], rotary[span]), dim=-1)
            parts.append(_up_projected(whole, latents[span], weights.kv_b, kv, group, spec))
    return ranks.all_reduce(linear(torch.cat(parts).flatten(1), weights.o))


def _up_projected(
    queries: Tensor,
    latents: Tensor,
    kv_b: Tensor,
    kv: Tensor,
    group: AttentionGroup,
    spec: ModelSpec,
) -> Tensor:
    return mla_prefill(
        queries,
        latents,
        kv,
        group.page_table,
        group.query_starts,
        group.lengths,
        kv_b,
        spec.softmax_scale,
    )


def _absorbed(
    nope: Tensor, rotary: Tensor, kv_b: Tensor, kv: Tensor, group: AttentionGroup, spec: ModelSpec
) -> Tensor:
    """q (W_UK c) = (q W_UK) c, and W_UV (p c) afterwards: keys and values are never built."""
    w_uk, w_uv = torch.split(kv_b, [spec.qk_nope_head_dim, spec.v_head_dim], dim=1)
    queries = torch.cat(((nope.transpose(0, 1) @ w_uk).transpose(0, 1), rotary), dim=-1)
    latent_out = mla_decode(
        queries,
        kv,
        group.page_table,
        group.query_starts,
        group.lengths,
        group.max_query_len,
        group.max_length,
        spec.kv_lora_rank,
        spec.softmax_scale,
    )
    return (latent_out.transpose(0, 1) @ w_uv.transpose(1, 2)).transpose(0, 1)
