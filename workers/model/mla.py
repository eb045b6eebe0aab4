"""Multi-head latent attention: a token's keys and values are one latent vector, kept in pages.

There are two equivalent ways to attend, chosen per row and step in `inputs.py`: up-projected (each
head gets its own keys and values) and absorbed (queries are projected into latent space).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...kernels.attention.backends import decode_backend, prefill_backend
from ...kernels.attention.mla_decode import mla_decode
from ...kernels.attention.mla_prefill import mla_prefill
from ...kernels.attention.mla_projections import absorb_queries, expand_values, up_project
from ...kernels.attention.rope import RopeAngles, rope_absorb, rope_write
from ...kernels.dense.linear import norm_linear
from ...shared.model_spec import ModelSpec
from ..inputs import AttentionGroup

LATENT_NORM_EPS = 1e-6  # of both latent norms; config.json's rms_norm_eps is for the others


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention, this rank's heads only. Float type of the model."""

    qkv_a: Tensor  # [q_lora_rank + latent_dim, hidden]: down-projections of queries and KV
    q_norm: Tensor  # [q_lora_rank]
    q_b: Tensor  # [heads * qk_head_dim, q_lora_rank]
    kv_norm: Tensor  # [kv_lora_rank]
    kv_b: Tensor  # [heads, qk_nope_head_dim + v_head_dim, kv_lora_rank]: W_UK over W_UV
    o: Tensor  # [hidden, heads * v_head_dim]
    scale: float  # of the scores before the softmax
    spec: ModelSpec

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """W_UK [heads, qk_nope_head_dim, kv_lora_rank], W_UV [heads, v_head_dim, kv_lora_rank]."""
        w_uk, w_uv = torch.split(self.kv_b, [self.spec.qk_nope_head_dim, self.spec.v_head_dim], 1)
        return w_uk, w_uv


@dataclass(frozen=True)
class Projected:
    """Tokens after `project`, before attention. Their latents are in the KV pages as well."""

    # [num_tokens, heads, qk_head_dim]; without latents absorbed: [num_tokens, heads, latent_dim]
    queries: Tensor
    latents: Tensor | None = None  # [num_tokens, latent_dim]
    # Up-projected from the latents, if that is done already: [num_tokens, heads, qk_head_dim] and
    # [num_tokens, heads, v_head_dim].
    keys_values: tuple[Tensor, Tensor] | None = None

    def cut(self, span: slice) -> "Projected":
        """The tokens of a span."""
        latents, pair = self.latents, self.keys_values
        return Projected(
            self.queries[span],
            None if latents is None else latents[span],
            None if pair is None else (pair[0][span], pair[1][span]),
        )


def project(
    stream: Tensor,
    norm: Tensor,
    weights: AttentionWeights,
    slots: Tensor,
    angles: RopeAngles,
    kv: Tensor,
    absorb: bool = False,
    out: Projected | None = None,
) -> Projected:
    """Everything before attention, token by token, of the norm (weight `norm`) of the stream
    [num_tokens, hidden]. Writes the tokens' latents into kv [num_pages, page_size, latent_dim] at
    `slots` [num_tokens] int64. With `absorb` the queries are absorbed at once, in the kernel that
    rotates them. `out`: buffers to fill, not with `absorb`."""
    spec = weights.spec
    both = norm_linear(stream, norm, spec.rms_norm_eps, weights.qkv_a)
    q_latent, kv_a = torch.split(both, [spec.q_lora_rank, kv.shape[-1]], dim=-1)
    flat = None if out is None else out.queries.flatten(1)
    queries = norm_linear(q_latent, weights.q_norm, LATENT_NORM_EPS, weights.q_b, flat)
    queries = queries.view(len(stream), len(weights.kv_b), -1)
    kv_norm = weights.kv_norm
    if absorb:
        w_uk, _ = weights.halves
        queries = rope_absorb(queries, kv_a, kv_norm, LATENT_NORM_EPS, angles, kv, slots, w_uk)
        return Projected(queries)
    if out is None or out.latents is None:
        out = Projected(queries, stream.new_empty(len(stream), kv.shape[-1]))
    rope_write(queries, kv_a, kv_norm, LATENT_NORM_EPS, angles, kv, slots, out.latents)
    if out.keys_values is not None and out.latents is not None:
        up_project(out.latents, weights.kv_b, spec.qk_nope_head_dim, out.keys_values)
    return out


def attend(
    projected: Projected,
    weights: AttentionWeights,
    groups: Sequence[AttentionGroup],
    kv: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of projected tokens -> [num_tokens, heads, v_head_dim], in `out` if given."""
    if out is None and len(groups) == 1:
        return _attend_group(projected, weights, groups[0], kv)
    if out is None:
        shape = (*projected.queries.shape[:2], weights.spec.v_head_dim)
        out = projected.queries.new_empty(shape)
    for group in groups:
        target = out[group.span]
        values = _attend_group(projected.cut(group.span), weights, group, kv, target)
        if values.data_ptr() != target.data_ptr():  # a backend that cannot write there
            target.copy_(values)
    return out


def _attend_group(
    tokens: Projected,
    weights: AttentionWeights,
    group: AttentionGroup,
    kv: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    spec, queries = weights.spec, tokens.queries
    if not group.absorbed:
        backend = prefill_backend(group.backend, queries, spec.v_head_dim)
        new_tokens = tokens.latents if backend == "torch" else tokens.keys_values or tokens.latents
        assert new_tokens is not None, "absorbed queries cannot attend up-projected"
        scale, kv_b = weights.scale, weights.kv_b
        return mla_prefill(queries, new_tokens, kv, group.rows, kv_b, scale, backend, out)
    w_uk, w_uv = weights.halves
    if tokens.latents is not None:
        queries = absorb_queries(queries, w_uk)
    if group.planned is not None:
        return expand_values(group.planned.run(queries, kv), w_uv, out)
    backend = decode_backend(group.backend, queries)
    value_dim, scale = spec.kv_lora_rank, weights.scale
    return mla_decode(queries, kv, group.rows, value_dim, scale, backend, w_uv, out)
