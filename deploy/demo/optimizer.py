"""Muon for the stacks of matrices, Adam for everything else.

Muon (K. Jordan, 2024): the momentum of a matrix is orthogonalised by a Newton-Schulz iteration
before it is applied, here for all matrices of a stack at once.
"""

from typing import Any

import torch
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95
_WEIGHT_DECAY = 0.1  # without it attention scores grow until they overflow
_ADAM_SHARE = 0.5  # of Muon's learning rate


class Muon(torch.optim.Optimizer):
    """For parameters [..., rows, columns]: each matrix gets an update whose entries have a root
    mean square of about 0.2 x the learning rate, like Adam's."""

    def __init__(self, params: list[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all parameters."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - _MOMENTUM)
                update = _orthogonal(p.grad.lerp(momentum, _MOMENTUM))
                p.mul_(1 - group["lr"] * _WEIGHT_DECAY)
                p.add_(update.float(), alpha=-0.2 * group["lr"] * max(p.shape[-2:]) ** 0.5)


def _orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest matrices with orthonormal rows or columns, bf16."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = x.mT if tall else x
    return result


def skip_if_not_finite(weights: dict[str, Tensor]) -> None:
    """Gradients of a step that overflowed are set to zero, without asking the GPU."""
    grads = [w.grad for w in weights.values() if w.grad is not None]
    norms = torch.stack([grad.norm() for grad in grads])
    finite = norms.isfinite().all().float()
    for grad in grads:
        grad.nan_to_num_(0.0, 0.0, 0.0).mul_(finite)


def make_optimizers(weights: dict[str, Tensor], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for stacked matrices at `lr`, Adam for the rest (embedding, head, router, norms) at
    half of it."""
    plain = {"embed", "head", "router"}
    matrices = [
        w
        for name, w in weights.items()
        if w.dim() >= 2 and "norm" not in name and name not in plain
    ]
    taken = {id(w) for w in matrices}
    rest = [w for w in weights.values() if id(w) not in taken]
    adam = torch.optim.AdamW(
        rest, lr=lr * _ADAM_SHARE, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    return [Muon(matrices, lr), adam]
