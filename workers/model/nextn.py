"""Weights of the NextN layer (MTP): one more decoder layer that drafts the token after the next."""

from dataclasses import dataclass

from torch import Tensor

from .glm4_moe_lite import LayerWeights


@dataclass(frozen=True)
class NextnWeights:
    """This rank's share. Embedding and head are the main model's own tensors wherever the
    checkpoint's copies hold the same bytes."""

    enorm: Tensor  # [hidden], of the embedded token
    hnorm: Tensor  # [hidden], of the main model's hidden state
    eh_proj: Tensor  # [hidden, 2 * hidden]: columns of the embedding, then of the hidden state
    layer: LayerWeights
    norm: Tensor  # [hidden], shared_head.norm
    embedding: Tensor  # [vocab, hidden]
    head: Tensor  # [ceil(vocab / ranks), hidden], as in ModelWeights
