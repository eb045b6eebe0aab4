"""Gated MLP, dense and as a mixture of experts.

On CUDA neither waits for the device. The result of a token does not depend on the other tokens, as
long as their number leads to the same kernels.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as dense
from torch.nn.functional import silu

from ..dense.linear import linear
from ..tiles import choose

# Up to so many tokens are computed one by one, although they may read an expert twice. On an H200
# two tokens took 46 us one by one and 49 us by the grouped kernel; three took 67 and 66.
_SINGLE_TOKENS = 2
_SLICE = 16384  # tokens at a time, which bounds the intermediates: 10 KB a pair at full size


def gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor, add_to: Tensor | None = None) -> Tensor:
    """down(silu(gate(x)) * up(x)).

    x [num_tokens, hidden], rows may be strided
    gate_up [2 * width, hidden] (gate first), down [hidden, width], contiguous
    add_to [num_tokens, hidden], contiguous: if given, the result is added to it in place
    All of one float type -> [num_tokens, hidden]: `add_to` or a new tensor.
    """
    if not x.is_cuda:
        gate, up = dense(x, gate_up).chunk(2, dim=-1)
        return linear(silu(gate) * up, down, add_to=add_to)
    from .experts_triton import silu_mul

    return linear(silu_mul(linear(x, gate_up)), down, add_to=add_to)


def moe(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    add_to: Tensor | None = None,
) -> Tensor:
    """Sum over the experts of each token of weight * gated_mlp, added up in float32.

    x [num_tokens, hidden]
    ids [num_tokens, k] int: the experts of each token, all different
    weights [num_tokens, k] float32
    gate_up [num_experts, 2 * width, hidden] (gate first), down [num_experts, hidden, width],
        contiguous, of the type of x
    add_to [num_tokens, hidden], contiguous, of the type of x: if given, the result is added to it
        in place
    -> [num_tokens, hidden]: `add_to` or a new tensor. Experts without tokens cost nothing. A shared
    expert is one more expert, chosen by every token. float32 on CUDA is for tests: it runs the
    reference, which waits for the device.
    """
    if not x.is_cuda or x.dtype == torch.float32:
        total = moe_reference(x, ids, weights, gate_up, down)
        return total if add_to is None else add_to.add_(total)
    from .experts_triton import ONE_TILE, default_tile, moe_grouped, moe_one, split_tile

    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    shape = (len(gate_up), down.shape[2], down.shape[1], ids.shape[1])
    add, out = add_to is not None, torch.empty_like(x) if add_to is None else add_to
    if 0 < len(x) <= _SINGLE_TOKENS:
        tile = choose("moe_one", shape, 1, ONE_TILE)
        return moe_one(x, ids, weights, gate_up, down, tile, out, add)
    for begin in range(0, len(x), _SLICE):
        span = slice(begin, begin + _SLICE)
        count = len(x[span])
        tile = choose("moe", shape, count, default_tile(count, shape[3], shape[0]))
        configs = split_tile(tile)
        moe_grouped(x[span], ids[span], weights[span], gate_up, down, configs, out[span], add)
    return out


def moe_reference(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`moe` in plain torch, over tokens sorted by expert; returns a new tensor."""
    order = ids.flatten().argsort(stable=True)
    tokens = order // ids.shape[1]
    sorted_x = x[tokens]
    sorted_weights = weights.flatten()[order, None]
    output = torch.zeros_like(x, dtype=torch.float32)
    begin = 0
    for expert, count in enumerate(ids.flatten().bincount(minlength=len(gate_up)).tolist()):
        if count:
            span = slice(begin, begin + count)
            gate, up = dense(sorted_x[span], gate_up[expert]).chunk(2, dim=-1)
            part = dense(silu(gate) * up, down[expert])
            output.index_add_(0, tokens[span], part * sorted_weights[span])
            begin += count
    return output.to(x.dtype)
