"""The MLP of a layer: widths split over ranks add up, with and without shared experts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.model_spec import ModelSpec, load_model_spec
from glimmer.workers.model.glm4_moe_lite import DenseWeights, MoeWeights, mlp
from glimmer.workers.parallel import Ranks
from glimmer.workers.weights.weights import observe_routing, random_weights


@pytest.fixture
def spec(tiny_model: Path) -> ModelSpec:
    return load_model_spec(tiny_model)


def added(x: torch.Tensor, weights: DenseWeights | MoeWeights, spec: ModelSpec) -> torch.Tensor:
    """The change that the MLP makes to x."""
    stream = x.clone()
    mlp(stream, torch.ones(x.shape[1]), weights, spec, Ranks())
    return stream - x


def halves(weights: DenseWeights) -> list[DenseWeights]:
    gate, up = weights.gate_up.chunk(2)
    rows = zip(gate.chunk(2), up.chunk(2), weights.down.chunk(2, 1), strict=True)
    return [DenseWeights(torch.cat((g, u)), d) for g, u, d in rows]


def test_dense_widths_add_up(spec: ModelSpec) -> None:
    weights = random_weights(spec, Ranks(), torch.float32, "cpu").layers[0].mlp
    assert isinstance(weights, DenseWeights)
    x = torch.randn(5, spec.hidden_size)
    parts = [added(x, half, spec) for half in halves(weights)]
    torch.testing.assert_close(sum(parts), added(x, weights, spec), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_expert_widths_and_shared_expert_add_up(spec: ModelSpec, num_tokens: int) -> None:
    weights = random_weights(spec, Ranks(), torch.float32, "cpu").layers[2].mlp
    assert isinstance(weights, MoeWeights)
    assert weights.shared is not None
    x = torch.randn(num_tokens, spec.hidden_size)
    gate, up = weights.gate_up.chunk(2, 1)
    rows = zip(gate.chunk(2, 1), up.chunk(2, 1), weights.down.chunk(2, 2), strict=True)
    total = torch.zeros_like(x)
    for g, u, d in rows:
        routed = dataclasses.replace(
            weights, gate_up=torch.cat((g, u), 1), down=d, shared=None, stacked=None
        )
        total += added(x, routed, spec)
    total += added(x, weights.shared, spec)
    torch.testing.assert_close(total, added(x, weights, spec), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["plain", "grouped"])
def test_an_observer_sees_the_routed_experts(make_reference: Any, variant: str) -> None:
    """Not the shared expert, which every token has."""
    spec = load_model_spec(make_reference(variant).path)
    seen: list[torch.Tensor] = []
    plain = random_weights(spec, Ranks(), torch.float32, "cpu", with_nextn=True)
    model = observe_routing(plain, seen.append)
    assert model.nextn is not None
    x = torch.randn(5, spec.hidden_size)
    for layer in (*model.layers, model.nextn.layer):
        added(x, layer.mlp, spec)
    assert len(seen) == spec.num_layers - spec.first_dense_layers + 1
    for ids in seen:
        assert ids.shape == (5, spec.num_experts_per_token)
        assert ids.max() < spec.num_experts
    assert plain.layers[-1].mlp.gate_up is model.layers[-1].mlp.gate_up
