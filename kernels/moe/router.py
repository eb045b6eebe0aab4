"""Chooses the experts of each token: sigmoid scores, selection by corrected score."""

import torch
from torch import Tensor

from ..dense.rms_norm import rms_norm

# So many tokens are normed by the kernel that routes them: four took 4.2 us so, 6.3 in two launches
# on an H200.
NORM_TOKENS = 4


def route(
    x: Tensor,
    weight: Tensor,
    correction_bias: Tensor,
    num_chosen: int,
    num_groups: int,
    num_chosen_groups: int,
    normalise: bool,
    scaling: float,
    num_shared: int = 0,
) -> tuple[Tensor, Tensor]:
    """(expert ids [num_tokens, num_chosen + num_shared], weights of the same shape, float32).

    x [num_tokens, hidden], weight [num_experts, hidden] of any float type, computed in float32;
    correction_bias [num_experts] float32 takes part in the choice, not in the weights. Experts
    come from the `num_chosen_groups` groups whose two best corrected scores sum highest.
    `normalise` makes weights sum to 1 before `scaling`. The last `num_shared` columns name the
    experts behind the routed ones, num_experts onwards, with weight 1. ids are int64, or int32
    from the kernel, which is one launch and runs on CUDA unless there are groups to choose from.
    """
    if x.is_cuda and num_chosen_groups >= num_groups:
        from .router_triton import launch_route

        return launch_route(x, weight, correction_bias, num_chosen, normalise, scaling, num_shared)
    scores = (x.float() @ weight.float().T).sigmoid()
    choice = scores + correction_bias
    if num_chosen_groups < num_groups:
        choice = _keep_best_groups(choice, num_groups, num_chosen_groups)
    ids = choice.topk(num_chosen, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * scaling
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
    num_chosen: int,
    num_groups: int,
    num_chosen_groups: int,
    normalise: bool,
    scaling: float,
    num_shared: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed x, *`route` of it): the RMS norm with weight `norm` [hidden] and what else `route`
    takes. For few tokens on CUDA one launch, unless there are groups to choose from."""
    scales = normalise, scaling, num_shared
    if x.is_cuda and 0 < len(x) <= NORM_TOKENS and num_chosen_groups >= num_groups:
        from .router_triton import launch_norm_route

        return launch_norm_route(x, norm, eps, weight, correction_bias, num_chosen, *scales)
    x = rms_norm(x, norm, eps)
    given = x, weight, correction_bias, num_chosen, num_groups, num_chosen_groups
    return x, *route(*given, *scales)


def _keep_best_groups(choice: Tensor, num_groups: int, num_kept: int) -> Tensor:
    """Scores of experts outside the best groups become -inf."""
    grouped = choice.view(len(choice), num_groups, choice.shape[1] // num_groups)
    totals = grouped.topk(min(2, grouped.shape[2]), dim=-1).values.sum(-1)
    kept = totals.topk(num_kept, dim=-1, sorted=False).indices
    dropped = torch.ones_like(totals, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped[..., None], -torch.inf).view_as(choice)
