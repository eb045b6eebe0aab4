"""The model, top to bottom: token ids in, hidden states and logits out.

Weights are plain dataclasses of tensors, filled by `weights.py`. One forward pass takes the
tokens of all rows of a step as one flat batch; only attention looks at rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.nn.functional import linear as plain_linear

from ...kernels.attention.rope import RopeAngles, rope_angles
from ...kernels.dense.linear import linear, rms_norm
from ...kernels.moe.experts import gated_mlp, moe
from ...kernels.moe.router import RouterSettings, norm_route
from ...shared.model_spec import ModelSpec
from ..inputs import AttentionGroup, StepInputs
from ..parallel import Ranks
from .mla import AttentionWeights, Projected, attend, project

if TYPE_CHECKING:
    from .nextn import NextnWeights


@dataclass(frozen=True)
class DenseWeights:
    """A gated MLP; `width` is this rank's share of its intermediate size."""

    gate_up: Tensor  # [2 * width, hidden], gate first
    down: Tensor  # [hidden, width]


@dataclass(frozen=True)
class MoeWeights:
    """Router (float32, whole) and experts (this rank's share of each)."""

    router: Tensor  # [num_experts, hidden] float32
    correction_bias: Tensor  # [num_experts] float32
    settings: RouterSettings
    gate_up: Tensor  # [num_experts, 2 * width, hidden]
    down: Tensor  # [num_experts, hidden, width]
    shared: DenseWeights | None
    # (gate_up, down) with the shared expert as the last one, of which the fields above are views;
    # then it runs with the others, as one that every token chooses.
    stacked: tuple[Tensor, Tensor] | None = None
    # Benchmarks count experts: called with the routed expert ids [num_tokens, k] of each pass that
    # is not a replay of a CUDA graph.
    on_route: Callable[[Tensor], None] | None = None


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer of this rank: its weights, and the order of its parts.

    The parts are separate because CUDA graphs of prompts (`layer_graphs.py`) capture what comes
    before and after attention, but not attention itself. The residual stream [num_tokens, hidden]
    is changed in place; kv [num_pages, page_size, latent_dim] is this layer's pages.
    """

    input_norm: Tensor  # [hidden]
    attention: AttentionWeights
    mlp_norm: Tensor  # [hidden]
    mlp: DenseWeights | MoeWeights
    spec: ModelSpec
    ranks: Ranks

    def run(self, stream: Tensor, inputs: StepInputs, angles: RopeAngles, kv: Tensor) -> None:
        """The whole layer."""
        absorb = all(group.absorbed for group in inputs.groups)
        norm, weights = self.input_norm, self.attention
        tokens = project(stream, norm, weights, inputs.slots, angles, kv, absorb)
        self.after_attention(stream, attend(tokens, weights, inputs.groups, kv))

    def before_attention(
        self, stream: Tensor, slots: Tensor, angles: RopeAngles, kv: Tensor, out: Projected
    ) -> None:
        """Project the tokens into the buffers `out`, and write their latents into kv at `slots`
        [num_tokens] int64."""
        project(stream, self.input_norm, self.attention, slots, angles, kv, out=out)

    def attend(
        self, tokens: Projected, groups: Sequence[AttentionGroup], kv: Tensor, out: Tensor
    ) -> None:
        """Attention of tokens from `before_attention` into out [num_tokens, heads, v_head_dim]."""
        attend(tokens, self.attention, groups, kv, out)

    def after_attention(self, stream: Tensor, values: Tensor) -> None:
        """Add attention's values [num_tokens, heads, v_head_dim], projected and summed over ranks,
        and then the MLP."""
        part = self.ranks.part_of(stream)
        linear(values.flatten(1), self.attention.o, add_to=part)
        self.ranks.add_up(part, stream)
        mlp(stream, self.mlp_norm, self.mlp, self.spec, self.ranks)


@dataclass(frozen=True)
class ModelWeights:
    """The whole model, this rank's share."""

    embedding: Tensor  # [vocab, hidden]
    layers: list[DecoderLayer]
    norm: Tensor  # [hidden]
    head: Tensor  # [ceil(vocab / ranks), hidden]: this rank's rows, zeros after the last
    spec: ModelSpec
    ranks: Ranks
    nextn: "NextnWeights | None" = None  # the draft layer, with --mtp_mode


def hidden_states(model: ModelWeights, inputs: StepInputs, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Run the step's tokens, writing their latents into kv [pages, layers, page_size, latent_dim].
    -> final hidden states [num_tokens, hidden] in the model's float type, after the last norm and
    before it: a draft layer may want either."""
    stream, angles = embed(model, inputs.token_ids, inputs.positions)
    for number, layer in enumerate(model.layers):
        layer.run(stream, inputs, angles, kv[:, number])
    return rms_norm(stream, model.norm, model.spec.rms_norm_eps), stream


def embed(model: ModelWeights, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, RopeAngles]:
    """token_ids, positions [num_tokens] int64 -> the residual stream [num_tokens, hidden] before
    the first layer, which layers add to in place, and the angles of all layers."""
    spec = model.spec
    dim, theta = spec.qk_rope_head_dim, spec.rope_theta
    angles = rope_angles(positions, dim, theta, spec.rope_interleave)
    return embedding(token_ids, model.embedding), angles


def mlp(
    stream: Tensor,
    norm: Tensor,
    weights: DenseWeights | MoeWeights,
    spec: ModelSpec,
    ranks: Ranks,
) -> None:
    """Add the MLP of the stream's norm (weight `norm`), summed over ranks, to the residual stream
    [num_tokens, hidden]. It is dense in the first layers, shared plus routed experts in the
    others."""
    eps, out = spec.rms_norm_eps, ranks.part_of(stream)
    if isinstance(weights, DenseWeights):
        gated_mlp(rms_norm(stream, norm, eps), weights.gate_up, weights.down, out)
        ranks.add_up(out, stream)
        return
    router, bias = weights.router, weights.correction_bias
    num_shared = 0 if weights.stacked is None else 1
    x, ids, scores = norm_route(stream, norm, eps, router, bias, weights.settings, num_shared)
    if weights.on_route is not None:
        weights.on_route(ids[:, : spec.num_experts_per_token])
    if weights.stacked is not None:
        moe(x, ids, scores, *weights.stacked, out)
    else:
        moe(x, ids, scores, weights.gate_up, weights.down, out)
        if weights.shared is not None:
            gated_mlp(x, weights.shared.gate_up, weights.shared.down, out)
    ranks.add_up(out, stream)


def compute_logits(
    model: "ModelWeights | NextnWeights", hidden: Tensor, out: Tensor | None = None
) -> Tensor | None:
    """hidden [n, hidden] -> [n, vocab] float32 on rank 0 (in `out`, if given), None on others."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        whole = out if model.ranks.size == 1 else None  # else this rank has a part of the columns
        logits = torch.mm(hidden, model.head.T, out_dtype=torch.float32, out=whole)
    else:
        logits = plain_linear(hidden, model.head).float()
    gathered = model.ranks.gather_columns(logits)
    if gathered is None:
        return None
    gathered = gathered[:, : model.spec.vocab_size]
    if out is None or gathered.data_ptr() == out.data_ptr():
        return gathered
    return out.copy_(gathered)
