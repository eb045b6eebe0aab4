"""Chooses the experts of each token: sigmoid scores, selection by scores plus a correction bias."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dense.linear import rms_norm

# Up to so many tokens are normed by the kernel that routes them. On an H200 four tokens took 4.2 us
# in one launch and 6.3 us in two.
NORM_TOKENS = 4


class RouterSettings(NamedTuple):
    """How a model chooses experts, the same in all its layers."""

    num_chosen: int  # experts per token
    num_groups: int  # the experts are divided into so many groups of neighbours
    num_chosen_groups: int  # whose two best corrected scores have the largest sums
    normalise: bool  # weights of a token sum to 1 before scaling
    scaling: float  # factor of all weights


def route(
    x: Tensor,
    weight: Tensor,
    correction_bias: Tensor,
    settings: RouterSettings,
    num_shared: int = 0,
) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token by the sigmoid of their scores, as DeepSeek-V3 does
    (https://arxiv.org/abs/2412.19437, section 2.1.2).

    x [num_tokens, hidden], rows may be strided
    weight [num_experts, hidden], contiguous, of any float type; scores are float32
    correction_bias [num_experts] float32: added to the scores for the choice, not for the weights
    num_shared: shared experts, numbered from num_experts on; every token has them with weight 1
    -> (ids, weights), both [num_tokens, num_chosen + num_shared], the shared experts last. weights
    are float32. ids are int64, or int32 from the kernel, which runs on CUDA in one launch unless
    the model has groups to choose from.
    """
    num_chosen = settings.num_chosen
    has_groups = settings.num_chosen_groups < settings.num_groups
    if x.is_cuda and not has_groups:
        from .router_triton import launch_route

        return launch_route(x, weight, correction_bias, settings, num_shared)
    scores = (x.float() @ weight.float().T).sigmoid()
    choice = scores + correction_bias
    if has_groups:
        choice = _keep_best_groups(choice, settings.num_groups, settings.num_chosen_groups)
    ids = choice.topk(num_chosen, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if settings.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * settings.scaling
    if num_shared:
        shared = torch.arange(len(weight), len(weight) + num_shared, device=x.device)
        ids = torch.cat((ids, shared.expand(len(x), -1)), 1)
        weights = torch.cat((weights, weights.new_ones(len(x), num_shared)), 1)
    return ids, weights


def norm_route(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    correction_bias: Tensor,
    settings: RouterSettings,
    num_shared: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm with weight `norm` [hidden] and epsilon `eps`, then `route`: one launch for few
    tokens on CUDA, unless the model has groups to choose from.

    x [num_tokens, hidden], contiguous; the other arguments as for `route`
    -> (normed x, ids, weights).
    """
    has_groups = settings.num_chosen_groups < settings.num_groups
    if x.is_cuda and 0 < len(x) <= NORM_TOKENS and not has_groups:
        from .router_triton import launch_norm_route

        return launch_norm_route(x, norm, eps, weight, correction_bias, settings, num_shared)
    normed = rms_norm(x, norm, eps)
    ids, weights = route(normed, weight, correction_bias, settings, num_shared)
    return normed, ids, weights


def _keep_best_groups(choice: Tensor, num_groups: int, num_kept: int) -> Tensor:
    """Set the scores [num_tokens, num_experts] of experts outside the best groups to -inf."""
    grouped = choice.view(len(choice), num_groups, choice.shape[1] // num_groups)
    totals = grouped.topk(min(2, grouped.shape[2]), dim=-1).values.sum(-1)
    best = totals.topk(num_kept, dim=-1, sorted=False).indices
    dropped = torch.ones_like(totals, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(dropped[..., None], -torch.inf).view_as(choice)
