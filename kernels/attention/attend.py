"""Softmax attention over one block of keys, and the log-sum-exp merge of two blocks.

What the attention references are made of: any set of keys can be cut into blocks whose results
merge exactly, so memory stays bounded however long the context is.
"""

import torch
from torch import Tensor

MAX_SCORES = 1 << 24  # elements of one block of scores or gathered keys: 64 MiB of float32
_LEAST = -1e30  # stands for the maximum of a query that sees no key of the block


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """queries [..., num_queries, dim], keys [..., num_keys, dim], values [..., num_keys, v_dim],
    all float32; visible [..., num_queries, num_keys] bool or None for all.

    -> (output [..., num_queries, v_dim], log-sum-exp [..., num_queries]), float32. A query that
    sees nothing gets zeros and -inf.
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
    """Fold one more block into the running (output, lse) in place; start from zeros and -inf."""
    merged = torch.logaddexp(lse, block_lse)
    floor = merged.clamp(min=_LEAST)  # -inf - -inf would be NaN
    output.mul_((lse - floor).exp_()[..., None])
    output.add_(block_output * (block_lse - floor).exp_()[..., None])
    lse.copy_(merged)
