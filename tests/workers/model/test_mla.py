"""The two ways to attend are one function; sharded heads add up to all heads."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.kernels.attention.rope import rope_angles
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.model_spec import ModelSpec, load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.inputs import StepInputs, build_batch
from glimmer.workers.model.mla import AttentionWeights, attend, project
from glimmer.workers.parallel import Ranks
from glimmer.workers.rows import RowTable
from glimmer.workers.weights.weights import random_weights


def step(cached: int, count: int) -> StepInputs:
    table = RowTable(1, 9, 4, 100, "cpu")
    params = SamplingParams(max_new_tokens=1)
    table.apply(
        StepPlan(0, 0, [], [RowAdmit(0, params, list(range(9)), cached, 0, [])], [], [], [])
    )
    chunk = PrefillChunk(0, cached, [0] * count, sample=True)
    return build_batch(StepPlan(0, 0, [], [], [], [chunk], []), table).inputs


@pytest.fixture
def spec(tiny_model: Path) -> ModelSpec:
    return load_model_spec(tiny_model)


def run(
    x: torch.Tensor,
    weights: AttentionWeights,
    inputs: StepInputs,
    kv: torch.Tensor,
    absorb: bool = False,
) -> torch.Tensor:
    spec = weights.spec
    dim, theta = spec.qk_rope_head_dim, spec.rope_theta
    angles = rope_angles(inputs.positions, dim, theta, spec.rope_interleave)
    norm = torch.ones(x.shape[1])
    projected = project(x, norm, weights, inputs.slots, angles, kv, absorb)
    values = attend(projected, weights, inputs.groups, kv)
    return values.flatten(1) @ weights.o.T


@pytest.mark.parametrize("count", [1, 5, 20])
def test_absorbed_equals_up_projected(spec: ModelSpec, count: int) -> None:
    weights = random_weights(spec, Ranks(), torch.float32, "cpu").layers[1].attention
    x = torch.randn(8 + count, spec.hidden_size)
    kv = torch.zeros(9, 4, spec.latent_dim)
    run(x[:8], weights, step(0, 8), kv)
    inputs = step(8, count)
    assert inputs.groups[0].absorbed
    absorbed = run(x[8:], weights, inputs, kv.clone())
    at_once = run(x[8:], weights, inputs, kv.clone(), absorb=True)
    groups: Any = [dataclasses.replace(inputs.groups[0], absorbed=False)]
    up_projected = run(x[8:], weights, dataclasses.replace(inputs, groups=groups), kv)
    torch.testing.assert_close(at_once, absorbed, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(absorbed, up_projected, atol=2e-5, rtol=1e-4)


def test_heads_of_two_ranks_add_up(spec: ModelSpec) -> None:
    whole = random_weights(spec, Ranks(), torch.float32, "cpu").layers[0].attention
    x = torch.randn(6, spec.hidden_size)
    kv = torch.zeros(9, 4, spec.latent_dim)
    expected = run(x, whole, step(0, 6), kv)
    total = torch.zeros_like(expected)
    for q_b, kv_b, o in zip(
        whole.q_b.chunk(2), whole.kv_b.chunk(2), whole.o.chunk(2, 1), strict=True
    ):
        half = dataclasses.replace(whole, q_b=q_b, kv_b=kv_b, o=o)
        total += run(x, half, step(0, 6), torch.zeros_like(kv))
    torch.testing.assert_close(total, expected, atol=2e-5, rtol=1e-4)
