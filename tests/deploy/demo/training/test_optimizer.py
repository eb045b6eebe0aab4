import torch
from glimmer.deploy.demo.training.optimizer import Muon, make_optimizers, skip_if_not_finite


def test_updates_are_orthogonal_and_go_down() -> None:
    torch.manual_seed(0)
    weights = torch.randn(3, 16, 8, requires_grad=True)
    target = torch.randn(3, 16, 8)
    before = weights.detach().clone()
    optimizer = Muon([weights], lr=0.01)
    torch.autograd.backward(((weights - target) ** 2).sum())
    optimizer.step()
    update = weights.detach() - before * (1 - 0.01 * 0.1)
    values = torch.linalg.svdvals(update)
    assert (values.max(-1).values / values.min(-1).values < 2).all()
    assert (((weights - target) ** 2).sum() < ((before - target) ** 2).sum()).item()


def test_every_weight_has_one_optimizer() -> None:
    shapes = {"embed": (4, 8), "head": (4, 8), "norm": (8,), "q_a_norm": (2, 8), "q_a": (2, 8, 8)}
    weights = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
    muon, adam = make_optimizers(weights, 0.1)
    ids = [{id(p) for g in o.param_groups for p in g["params"]} for o in (muon, adam)]
    assert ids[0] == {id(weights["q_a"])}
    assert ids[0] | ids[1] == {id(w) for w in weights.values()}


def test_a_step_that_overflowed_changes_nothing() -> None:
    weights = {name: torch.zeros(3, requires_grad=True) for name in "ab"}
    weights["a"].grad = torch.tensor([1.0, torch.nan, 2.0])
    weights["b"].grad = torch.ones(3)
    skip_if_not_finite(weights)
    assert all(w.grad is not None and not w.grad.any() for w in weights.values())
