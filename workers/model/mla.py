"""Multi-head latent attention: a token's keys and values are one latent vector, kept in pages.

Two equal ways to attend, chosen per row and step in `inputs.py`: up-projected (heads get their
own keys) and absorbed (queries go down into latent space).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention.mla_absorb import absorb_queries, expand_values
from ...kernels.attention.mla_decode import mla_decode
from ...kernels.attention.mla_prefill import mla_prefill
from ...kernels.attention.rope_absorb import rope_absorb
from ...kernels.attention.rope_write import rope_write
from ...kernels.backends import decode_backend, prefill_backend
from ...kernels.dense.linear import linear, norm_linear
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
    stream: Tensor,
    norm: Tensor,
    weights: AttentionWeights,
    inputs: StepInputs,
    angles: tuple[Tensor, Tensor],
    kv: Tensor,
    spec: ModelSpec,
    ranks: Ranks,
) -> None:
    """Add to the residual stream [num_tokens, hidden] what this layer's attention makes of its norm
    with weight `norm`, summed over ranks. Writes the tokens' latents into kv [num_pages,
    page_size, latent_dim], this layer's pages."""
    if all(group.absorbed for group in inputs.groups):
        queries, kv_a = _queries(stream, norm, weights, spec)
        w_uk, w_uv = _halves(weights.kv_b, spec)
        given = (queries, kv_a, weights.kv_norm, LATENT_NORM_EPS, angles, kv, inputs.slots)
        queries = rope_absorb(*given, spec.rope_interleave, w_uk)
        parts = [_absorbed(queries[g.span], w_uv, kv, g, spec) for g in inputs.groups]
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
    else:
        latents = stream.new_empty(len(stream), spec.latent_dim)
        queries = project(stream, norm, weights, inputs.slots, angles, kv, spec, latents)
        values = attend(queries, latents, weights.kv_b, inputs.groups, kv, spec)
    add_output(stream, values, weights, ranks)


def project(
    stream: Tensor,
    norm: Tensor,
    weights: AttentionWeights,
    slots: Tensor,
    angles: tuple[Tensor, Tensor],
    kv: Tensor,
    spec: ModelSpec,
    latents: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """What comes before attention, token by token: stream [num_tokens, hidden] -> queries
    [num_tokens, heads, qk_head_dim], in `out` if given. Writes the tokens' latents into kv at
    `slots` [num_tokens] int64, and into `latents` [num_tokens, latent_dim]."""
    queries, kv_a = _queries(stream, norm, weights, spec, out)
    given = (queries, kv_a, weights.kv_norm, LATENT_NORM_EPS, angles, kv, slots)
    rope_write(*given, spec.rope_interleave, latents)
    return queries


def _queries(
    stream: Tensor,
    norm: Tensor,
    weights: AttentionWeights,
    spec: ModelSpec,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> queries [num_tokens, heads, qk_head_dim] before rotation, in `out` if given, and
    compressed KV and keys [num_tokens, latent_dim], raw."""
    both = norm_linear(stream, norm, spec.rms_norm_eps, weights.qkv_a)
    q_latent, kv_a = torch.split(both, [spec.q_lora_rank, spec.latent_dim], dim=-1)
    flat = None if out is None else out.flatten(1)
    queries = norm_linear(q_latent, weights.q_norm, LATENT_NORM_EPS, weights.q_b, flat)
    return queries.view(len(stream), -1, spec.qk_head_dim), kv_a


def _halves(kv_b: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """W_UK [heads, qk_nope_head_dim, kv_lora_rank] and W_UV [heads, v_head_dim, kv_lora_rank]."""
    w_uk, w_uv = torch.split(kv_b, [spec.qk_nope_head_dim, spec.v_head_dim], dim=1)
    return w_uk, w_uv


def attend(
    queries: Tensor,
    latents: Tensor,
    kv_b: Tensor,
    groups: Sequence[AttentionGroup],
    kv: Tensor,
    spec: ModelSpec,
    own: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of what `project` made: queries [num_tokens, heads, qk_head_dim], latents
    [num_tokens, latent_dim] -> [num_tokens, heads, v_head_dim], in `out` if given. `own`: keys and
    values of the latents, if somebody has made them."""
    w_uk, w_uv = _halves(kv_b, spec)
    if out is None:
        out = queries.new_empty(*queries.shape[:2], spec.v_head_dim)
    for group in groups:
        span, room = group.span, out[group.span]
        if group.absorbed:
            part = _absorbed(absorb_queries(queries[span], w_uk), w_uv, kv, group, spec, room)
        else:
            mine = None if own is None else (own[0][span], own[1][span])
            part = _up_projected(queries[span], latents[span], kv_b, kv, group, spec, mine, room)
        if part.data_ptr() != room.data_ptr():  # a backend that cannot write there
            room.copy_(part)
    return out


def add_output(stream: Tensor, values: Tensor, weights: AttentionWeights, ranks: Ranks) -> None:
    """What comes behind attention: values [num_tokens, heads, v_head_dim] become a summand of the
    stream [num_tokens, hidden], over all ranks' heads."""
    part = ranks.part_of(stream)
    linear(values.flatten(1), weights.o, add_to=part)
    ranks.add_up(part, stream)


def _up_projected(
    queries: Tensor,
    latents: Tensor,
    kv_b: Tensor,
    kv: Tensor,
    group: AttentionGroup,
    spec: ModelSpec,
    own: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
) -> Tensor:
    return mla_prefill(
        queries,
        latents,
        kv,
        group.page_table,
        group.query_starts,
        group.query_lens,
        group.prefix_lens,
        kv_b,
        spec.softmax_scale,
        prefill_backend(group.backend, queries, spec.v_head_dim),
        own,
        out,
    )


def _absorbed(
    queries: Tensor,
    w_uv: Tensor,
    kv: Tensor,
    group: AttentionGroup,
    spec: ModelSpec,
    out: Tensor | None = None,
) -> Tensor:
    """queries [num_tokens, heads, latent_dim]."""
    if group.planned is not None:
        return expand_values(group.planned.run(queries, kv), w_uv, out)
    return mla_decode(
        queries,
        kv,
        group.page_table,
        group.query_starts,
        group.lengths,
        group.max_query_len,
        group.max_length,
        spec.kv_lora_rank,
        spec.softmax_scale,
        decode_backend(group.backend, queries),
        w_uv,
        out,
    )
