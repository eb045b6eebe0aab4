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
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - _MOMENTUM)
            updates = _all_orthogonal(list(torch._foreach_lerp(grads, momenta, _MOMENTUM)))
            torch._foreach_mul_(params, 1 - group["lr"] * _WEIGHT_DECAY)
            for p, update in zip(params, updates, strict=True):
                p.add_(update, alpha=-0.2 * group["lr"] * max(p.shape[-2:]) ** 0.5)


def _all_orthogonal(stacks: list[Tensor]) -> list[Tensor]:
    """`_orthogonal` of every stack. Matrices of equal shape are handled together, because launching
    many small products takes a GPU longer than computing them."""
    wide = [s.mT if s.shape[-2] > s.shape[-1] else s for s in stacks]
    flat = [s.bfloat16().reshape(-1, *s.shape[-2:]) for s in wide]
    results: list[Tensor] = list(flat)
    for shape in {s.shape[1:] for s in flat}:
        members = [n for n, s in enumerate(flat) if s.shape[1:] == shape]
        orthogonal = _orthogonal(torch.cat([flat[n] for n in members]))
        parts = torch.split(orthogonal, [len(flat[n]) for n in members])
        for n, part in zip(members, parts, strict=True):
            shaped = part.reshape(wide[n].shape)
            results[n] = shaped.mT if wide[n] is not stacks[n] else shaped
    return results


def _orthogonal(matrices: Tensor) -> Tensor:
    """Approximately the nearest matrices with orthonormal rows, [N, rows, columns >= rows]."""
    a, b, c = _NEWTON_SCHULZ
    x: Tensor = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def skip_if_not_finite(weights: dict[str, Tensor]) -> None:
    """Set all gradients to zero if one is not finite, without waiting for the GPU."""
    grads = [w.grad for w in weights.values() if w.grad is not None]
    finite = torch.stack(torch._foreach_norm(grads)).isfinite().all().float()
    for grad in grads:
        grad.nan_to_num_(0.0, 0.0, 0.0)
    torch._foreach_mul_(grads, finite)


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
