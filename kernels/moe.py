"""Gated MLP, dense and as a mixture of experts over tokens sorted by expert."""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


def gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)).

    x [num_tokens, hidden], gate_up [2 * width, hidden] (gate first), down [hidden, width], one
    float type -> [num_tokens, hidden].
    """
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(silu(gate) * up, down)


def moe(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sum over each token's experts of weight * gated_mlp, added up in float32.

    x [num_tokens, hidden]; ids [num_tokens, k] int64, weights [num_tokens, k] float32;
    gate_up [num_experts, 2 * width, hidden], down [num_experts, hidden, width] of x's type
    -> [num_tokens, hidden] of x's type. Experts without tokens cost nothing.
    """
    order = ids.flatten().argsort(stable=True)
    tokens = order // ids.shape[1]
    sorted_x = x[tokens]
    sorted_weights = weights.flatten()[order, None]
    output = torch.zeros_like(x, dtype=torch.float32)
    begin = 0
    for expert, count in enumerate(ids.flatten().bincount(minlength=len(gate_up)).tolist()):
        if count:
            span = slice(begin, begin + count)
            part = gated_mlp(sorted_x[span], gate_up[expert], down[expert])
            output.index_add_(0, tokens[span], part * sorted_weights[span])
            begin += count
    return output.to(x.dtype)
