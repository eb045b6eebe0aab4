"""The MLP of one layer: dense in the first layers, shared plus routed experts in the others."""

from dataclasses import dataclass

from torch import Tensor

from ...kernels.moe import gated_mlp, moe
from ...kernels.router import route
from ...shared.model_spec import ModelSpec
from ..parallel import Ranks


@dataclass(frozen=True)
class DenseWeights:
    """A gated MLP; `width` is this rank's share of its intermediate size."""

    gate_up: Tensor  # [2 * width, hidden], gate first
    down: Tensor  # [hidden, width]


@dataclass(frozen=True)
class MoeWeights:
    """Router (float32, whole) and experts (this rank's share of each)."""

    router: Tensor  # [num_experts, hidden] float32
    correction_bias: Tensor  # [num_experts] float32
    gate_up: Tensor  # [num_experts, 2 * width, hidden]
    down: Tensor  # [num_experts, hidden, width]
    shared: DenseWeights | None
    # (gate_up, down) with the shared expert as the last one, of which the fields above are views;
    # then it runs with the others, as one that every token chooses.
    stacked: tuple[Tensor, Tensor] | None = None


def mlp(x: Tensor, weights: DenseWeights | MoeWeights, spec: ModelSpec, ranks: Ranks) -> Tensor:
    """x [num_tokens, hidden] -> the same shape, summed over ranks."""
    if isinstance(weights, DenseWeights):
        return ranks.all_reduce(gated_mlp(x, weights.gate_up, weights.down))
    ids, scores = route(
        x,
        weights.router,
        weights.correction_bias,
        spec.num_experts_per_token,
        spec.num_expert_groups,
        spec.num_groups_per_token,
        spec.norm_topk_prob,
        spec.routed_scaling_factor,
        num_shared=0 if weights.stacked is None else 1,
    )
    if weights.stacked is not None:
        return ranks.all_reduce(moe(x, ids, scores, *weights.stacked))
    out = moe(x, ids, scores, weights.gate_up, weights.down)
    if weights.shared is not None:
        out = out + gated_mlp(x, weights.shared.gate_up, weights.shared.down)
    return ranks.all_reduce(out)
