from pathlib import Path

import pytest
import torch
from glimmer.deploy.demo.training import state
from glimmer.deploy.demo.training.optimizer import make_optimizers
from glimmer.deploy.demo.training.state import FULL, Progress

SHAPES = {"embed": (4, 8), "norm": (8,), "q_a": (2, 8, 8)}


def make_run(
    seed: int,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[torch.optim.Optimizer]]:
    generator = torch.Generator().manual_seed(seed)
    weights = {k: torch.randn(v, generator=generator) for k, v in SHAPES.items()}
    for tensor in weights.values():
        tensor.requires_grad_(True)
    return weights, torch.zeros(1, 2), make_optimizers(weights, 0.1)


def step(weights: dict[str, torch.Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    torch.autograd.backward(sum((w.sin().sum() for w in weights.values()), torch.zeros(())))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_a_run_that_went_on_equals_one_that_did_not_stop(tmp_path: Path) -> None:
    weights, bias, optimizers = make_run(0)
    step(weights, optimizers)
    state.save(tmp_path, Progress(1, 2.5), weights, bias + 3, optimizers)
    again, other_bias, others = make_run(1)
    assert state.load(tmp_path, again, other_bias, others) == Progress(1, 2.5)
    assert other_bias.tolist() == [[3, 3]]
    for _ in range(2):
        step(weights, optimizers)
        step(again, others)
    assert all(torch.equal(weights[k], again[k]) for k in weights)


def test_weights_alone_are_enough_to_go_on(tmp_path: Path) -> None:
    weights, bias, optimizers = make_run(0)
    step(weights, optimizers)
    state.save(tmp_path, Progress(7, 9.0), weights, bias, optimizers)
    (tmp_path / FULL).unlink()
    again, other_bias, others = make_run(1)
    assert state.load(tmp_path, again, other_bias, others) == Progress(7, 9.0)
    assert all(torch.equal(weights[k].bfloat16().float(), again[k]) for k in weights)
    step(again, others)


def test_no_files_are_a_new_run_and_wrong_ones_an_error(tmp_path: Path) -> None:
    weights, bias, optimizers = make_run(0)
    assert state.load(tmp_path / "new", weights, bias, optimizers) == Progress()
    state.save(tmp_path, Progress(1, 1.0), weights, bias, optimizers)
    other = {**weights, "q_a": torch.zeros(2, 8, 9)}
    with pytest.raises(ValueError, match=r"q_a is \[2, 8, 8\], not \[2, 8, 9\]"):
        state.load(tmp_path, other, bias, optimizers)
