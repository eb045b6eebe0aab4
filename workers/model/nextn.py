"""The NextN layer (MTP): one more decoder layer, which drafts the token after the next.

At position p it joins the embedding of token p + 1 and a hidden state of position p (the main
model's, or its own when it runs on its own drafts) and predicts token p + 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from ...kernels.attention.rope import rope_angles
from ...kernels.dense.linear import rms_norm
from ...kernels.sampling.sampling import greedy
from ...shared.model_spec import ModelSpec
from ..inputs import StepInputs
from ..parallel import Ranks
from .glm4_moe_lite import DecoderLayer, compute_logits


@dataclass(frozen=True)
class NextnWeights:
    """This rank's share. Embedding and head are the main model's own tensors wherever the
    checkpoint's copies hold the same bytes."""

    enorm: Tensor  # [hidden], of the embedded token
    hnorm: Tensor  # [hidden], of the main model's hidden state
    eh_proj: Tensor  # [hidden, 2 * hidden]: columns of the embedding, then of the hidden state
    layer: DecoderLayer
    norm: Tensor  # [hidden], shared_head.norm
    embedding: Tensor  # [vocab, hidden]
    head: Tensor  # [ceil(vocab / ranks), hidden], as in ModelWeights
    spec: ModelSpec
    ranks: Ranks


def nextn_states(
    nextn: NextnWeights, inputs: StepInputs, hidden: Tensor, kv: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the layer at the inputs' positions; their token ids are each position's *next* token.
    hidden [num_tokens, hidden]; latents go into kv [pages, page_size, latent_dim], the layer's own.
    -> (normed output, which the head reads; output before that norm), [num_tokens, hidden]."""
    spec, eps = nextn.spec, nextn.spec.rms_norm_eps
    embedded = rms_norm(embedding(inputs.token_ids, nextn.embedding), nextn.enorm, eps)
    both = torch.cat((embedded, rms_norm(hidden, nextn.hnorm, eps)), dim=-1)
    stream = linear(both, nextn.eh_proj)
    dim, theta = spec.qk_rope_head_dim, spec.rope_theta
    angles = rope_angles(inputs.positions, dim, theta, spec.rope_interleave)
    nextn.layer.run(stream, inputs, angles, kv)
    return rms_norm(stream, nextn.norm, eps), stream


def draft_ids(nextn: NextnWeights, normed: Tensor) -> Tensor:
    """The likeliest token of each row of normed [n, hidden] -> [n] int64, on all ranks."""
    logits = compute_logits(nextn, normed)
    if logits is None:
        ids = torch.empty(len(normed), dtype=torch.int64, device=normed.device)
    else:
        ids = greedy(logits[:, : nextn.spec.num_token_ids])[0]
    return nextn.ranks.broadcast(ids)
