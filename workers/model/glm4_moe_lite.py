"""The model, top to bottom: token ids in, hidden states and logits out.

Weights are plain dataclasses of tensors, filled by `weights.py`. One forward pass takes the
tokens of all rows of a step as one flat batch; only attention looks at rows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from ...kernels.rms_norm import add_rms_norm, rms_norm
from ...kernels.rope import rope_angles
from ...shared.model_spec import ModelSpec
from ..inputs import StepInputs
from ..parallel import Ranks
from .mla import AttentionWeights, attention
from .moe import DenseWeights, MoeWeights, mlp

if TYPE_CHECKING:
    from .nextn import NextnWeights


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: Tensor  # [hidden]
    attention: AttentionWeights
    mlp_norm: Tensor  # [hidden]
    mlp: DenseWeights | MoeWeights


@dataclass(frozen=True)
class ModelWeights:
    """The whole model, this rank's share."""

    embedding: Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: Tensor  # [hidden]
    head: Tensor  # [ceil(vocab / ranks), hidden]: this rank's rows, zeros behind the last
    nextn: "NextnWeights | None" = None  # the draft layer, with --mtp_mode

    def norm_after(self, number: int) -> Tensor:
        """Weight of the norm that reads what layer `number` leaves."""
        layers = self.layers
        return layers[number + 1].input_norm if number + 1 < len(layers) else self.norm


def hidden_states(
    model: ModelWeights, inputs: StepInputs, kv: Tensor, spec: ModelSpec, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Run the step's tokens, writing their latents into kv [pages, layers, page_size, latent_dim].
    -> final hidden states [num_tokens, hidden] in the model's float type, normed and before that
    norm: a draft layer may want either."""
    x, residual, angles = embed(model, inputs.token_ids, inputs.positions, spec)
    for number, layer in enumerate(model.layers):
        x = attention(x, layer.attention, inputs, angles, kv[:, number], spec, ranks)
        x, residual = behind_attention(x, residual, layer, model.norm_after(number), spec, ranks)
    return x, residual


def embed(
    model: ModelWeights, token_ids: Tensor, positions: Tensor, spec: ModelSpec
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What comes before the first attention: token_ids, positions [num_tokens] int64 -> (what it
    reads, residual stream), both [num_tokens, hidden], and the angles of all layers."""
    residual = embedding(token_ids, model.embedding)
    x = rms_norm(residual, model.layers[0].input_norm, spec.rms_norm_eps)
    return x, residual, rope_angles(positions, spec.qk_rope_head_dim, spec.rope_theta)


def behind_attention(
    x: Tensor,
    residual: Tensor,
    layer: LayerWeights,
    next_norm: Tensor,
    spec: ModelSpec,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """The rest of a layer, from attention's output x and the residual stream, both [num_tokens,
    hidden] -> the two behind it: the first normed for what reads it next."""
    x, residual = add_rms_norm(x, residual, layer.mlp_norm, spec.rms_norm_eps)
    x = mlp(x, layer.mlp, spec, ranks)
    return add_rms_norm(x, residual, next_norm, spec.rms_norm_eps)


def compute_logits(
    model: "ModelWeights | NextnWeights",
    hidden: Tensor,
    spec: ModelSpec,
    ranks: Ranks,
    out: Tensor | None = None,
) -> Tensor | None:
    """hidden [n, hidden] -> [n, vocab] float32 on rank 0 (in `out`, if given), None on others."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        whole = out if ranks.size == 1 else None  # else this rank has a part of the columns
        logits = torch.mm(hidden, model.head.T, out_dtype=torch.float32, out=whole)
    else:
        logits = linear(hidden, model.head).float()
    gathered = ranks.gather_columns(logits)
    if gathered is None:
        return None
    gathered = gathered[:, : spec.vocab_size]
    if out is None or gathered.data_ptr() == out.data_ptr():
        return gathered
    return out.copy_(gathered)
