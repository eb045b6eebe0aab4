"""The MLP of one layer: dense in the first layers, shared plus routed experts in the others."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...kernels.dense.rms_norm import rms_norm
from ...kernels.moe.experts import gated_mlp, moe
from ...kernels.moe.router import RouterSettings, norm_route
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
    settings: RouterSettings
    gate_up: Tensor  # [num_experts, 2 * width, hidden]
    down: Tensor  # [num_experts, hidden, width]
    shared: DenseWeights | None
    # (gate_up, down) with the shared expert as the last one, of which the fields above are views;
    # then it runs with the others, as one that every token chooses.
    stacked: tuple[Tensor, Tensor] | None = None
    # Benchmarks count experts: called with the routed expert ids [num_tokens, k] of each pass that
    # is not a replay of a CUDA graph.
    on_route: Callable[[Tensor], None] | None = None


def mlp(
    stream: Tensor,
    norm: Tensor,
    weights: DenseWeights | MoeWeights,
    spec: ModelSpec,
    ranks: Ranks,
) -> None:
    """Add this layer's MLP of the stream's norm (weight `norm`), summed over ranks, to the residual
    stream [num_tokens, hidden]."""
    eps, out = spec.rms_norm_eps, ranks.part_of(stream)
    if isinstance(weights, DenseWeights):
        gated_mlp(rms_norm(stream, norm, eps), weights.gate_up, weights.down, out)
        ranks.add_up(out, stream)
        return
    router, bias = weights.router, weights.correction_bias
    num_shared = 0 if weights.stacked is None else 1
    x, ids, scores = norm_route(stream, norm, eps, router, bias, weights.settings, num_shared)
    if weights.on_route is not None:
        weights.on_route(ids[:, : spec.num_experts_per_token])
    if weights.stacked is not None:
        moe(x, ids, scores, *weights.stacked, out)
    else:
        moe(x, ids, scores, weights.gate_up, weights.down, out)
        if weights.shared is not None:
            gated_mlp(x, weights.shared.gate_up, weights.shared.down, out)
    ranks.add_up(out, stream)
