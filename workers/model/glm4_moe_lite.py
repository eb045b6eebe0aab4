"""The model, top to bottom: token ids in, hidden states and logits out.

Weights are plain dataclasses of tensors, filled by `weights.py`. One forward pass takes the
tokens of all rows of a step as one flat batch; only attention looks at rows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from ...kernels.attention.rope import rope_angles
from ...kernels.dense.rms_norm import rms_norm
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


def hidden_states(
    model: ModelWeights, inputs: StepInputs, kv: Tensor, spec: ModelSpec, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Run the step's tokens, writing their latents into kv [pages, layers, page_size, latent_dim].
    -> final hidden states [num_tokens, hidden] in the model's float type, normed and before that
    norm: a draft layer may want either."""
    stream, angles = embed(model, inputs.token_ids, inputs.positions, spec)
    for number, layer in enumerate(model.layers):
        here = kv[:, number]
        attention(stream, layer.input_norm, layer.attention, inputs, angles, here, spec, ranks)
        mlp(stream, layer.mlp_norm, layer.mlp, spec, ranks)
    return rms_norm(stream, model.norm, spec.rms_norm_eps), stream


def embed(
    model: ModelWeights, token_ids: Tensor, positions: Tensor, spec: ModelSpec
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What comes before the first layer: token_ids, positions [num_tokens] int64 -> the residual
    stream [num_tokens, hidden], which layers add to in place, and the angles of all layers."""
    stream = embedding(token_ids, model.embedding)
    return stream, rope_angles(positions, spec.qk_rope_head_dim, spec.rope_theta)


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
