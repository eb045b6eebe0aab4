"""The model, top to bottom: token ids in, hidden states and logits out.

Weights are plain dataclasses of tensors, filled by `weights.py`. One forward pass takes the
tokens of all rows of a step as one flat batch; only attention looks at rows.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import embedding, linear

from ...kernels.rms_norm import add_rms_norm, rms_norm
from ...kernels.rope import rope_angles
from ...shared.model_spec import ModelSpec
from ..inputs import StepInputs
from ..parallel import Ranks
from .mla import AttentionWeights, attention
from .moe import DenseWeights, MoeWeights, mlp


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


def forward(
    model: ModelWeights, inputs: StepInputs, kv: Tensor, spec: ModelSpec, ranks: Ranks
) -> Tensor:
    """Run the step's tokens, writing their latents into kv [pages, layers, page_size, latent_dim].
    -> final normed hidden states [num_tokens, hidden] in the model's float type."""
    residual = embedding(inputs.token_ids, model.embedding)
    angles = rope_angles(inputs.positions, spec.qk_rope_head_dim, spec.rope_theta)
    eps = spec.rms_norm_eps
    x = rms_norm(residual, model.layers[0].input_norm, eps)
    for number, layer in enumerate(model.layers):
        if number:
            x, residual = add_rms_norm(x, residual, layer.input_norm, eps)
        x = attention(x, layer.attention, inputs, angles, kv[:, number], spec, ranks)
        x, residual = add_rms_norm(x, residual, layer.mlp_norm, eps)
        x = mlp(x, layer.mlp, spec, ranks)
    return add_rms_norm(x, residual, model.norm, eps)[0]


def compute_logits(
    model: ModelWeights, hidden: Tensor, spec: ModelSpec, ranks: Ranks
) -> Tensor | None:
    """hidden [n, hidden] -> [n, vocab] float32 on rank 0, None on the others."""
    logits = ranks.gather_columns(linear(hidden, model.head))
    return None if logits is None else logits[:, : spec.vocab_size].float()
