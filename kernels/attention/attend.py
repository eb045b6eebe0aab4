"""Softmax attention over one block of keys, and the merge of two blocks by their log-sum-exp.

The attention references are built from these two. Any set of keys can be cut into blocks whose
results merge exactly, so memory stays bounded however long the context is. Formula: online softmax,
https://arxiv.org/abs/1805.02867.
"""

import torch
from torch import Tensor

MAX_SCORES = 1 << 24  # elements of one block of scores or gathered keys: 64 MiB of float32
_LEAST = -1e30  # in place of -inf as the maximum score of a query that sees no key of the block


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over one block of keys.

    queries [..., num_queries, dim], keys [..., num_keys, dim], values [..., num_keys, v_dim],
        float32
    visible [..., num_queries, num_keys] bool: the keys that each query sees; None: all
    -> (output [..., num_queries, v_dim], log-sum-exp of the scores [..., num_queries]), float32. A
    query that sees no key gets zeros and -inf.
    """
    scores = queries @ keys.transpose(-1, -2) * scale
    if visible is not None:
        scores = scores.masked_fill_(~visible, -torch.inf)
    peak = scores.amax(-1, keepdim=True).clamp_(min=_LEAST)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    output = (weights @ values) / total.clamp(min=torch.finfo(torch.float32).tiny)
    return output, (total.log() + peak).squeeze(-1)


def merge_(output: Tensor, lse: Tensor, block_output: Tensor, block_lse: Tensor) -> None:
    """Merge the results of one more block into (output, lse) in place. Start from zeros and -inf.

    output, block_output [..., num_queries, v_dim], lse, block_lse [..., num_queries], float32.
    """
    merged = torch.logaddexp(lse, block_lse)
    floor = merged.clamp(min=_LEAST)  # -inf - -inf would be NaN
    output.mul_((lse - floor).exp_()[..., None])
    output.add_(block_output * (block_lse - floor).exp_()[..., None])
    lse.copy_(merged)
