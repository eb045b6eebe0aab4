"""Against the NextN layer run over the whole sequence that a drafting engine would have built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.deploy.demo.checkpoint import make_checkpoint, tiny_config
from glimmer.deploy.demo.training.acceptance import DEPTH, accepted, measure
from glimmer.deploy.demo.training.model import (
    Batch,
    Weights,
    finish,
    init_weights,
    join,
    layers,
    linear,
    logits,
    project,
    rms_norm,
    trunk,
)

COUNT = 16


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return tiny_config(vocab_size=11, num_hidden_layers=2)


@pytest.fixture(scope="module")
def weights(config: dict[str, Any]) -> Weights:
    generator = torch.Generator().manual_seed(5)
    weights = init_weights(config, 0)
    return {k: v + torch.randn(v.shape, generator=generator) * 0.1 for k, v in weights.items()}


def drafts_one_by_one(
    w: Weights, bias: torch.Tensor, ids: torch.Tensor, at: int, before: bool, config: dict[str, Any]
) -> list[int]:
    eps = config["rms_norm_eps"]
    seen = Batch(ids[: at + 1], torch.arange(at + 1), torch.tensor([0, at + 1]), torch.ones(at + 1))
    hidden, _ = trunk(w, bias, seen, config)
    state = hidden if before else rms_norm(hidden, w["norm"], eps)
    x = join(w, ids[1 : at + 2], state, config)
    layer = layers(w)[-1]
    drafts = []
    for _ in range(DEPTH):
        q, k, v = project(layer, x, torch.arange(len(x)), config)
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        mask = torch.ones(len(x), len(x)).tril().bool()
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        y = torch.einsum("hqk,khd->qhd", mixed, v).flatten(1)
        out, _ = finish(layer, bias[-1], x, linear(y, layer["o"]), config)
        normed = rms_norm(out[-1:], w["shared_head_norm"], eps)
        drafts.append(int(logits(w, normed).argmax()))
        last = out[-1:] if before else normed
        x = torch.cat((x, join(w, torch.tensor(drafts[-1:]), last, config)))
    return drafts


@pytest.mark.parametrize("before", [True, False])
def test_every_draft_is_the_one_an_engine_would_make(
    weights: Weights, config: dict[str, Any], before: bool
) -> None:
    bias = torch.zeros(2, config["n_routed_experts"])
    ids = torch.randint(11, (COUNT,), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(2, COUNT - DEPTH - 1)
    depths = []
    for at in positions.tolist():
        wanted = drafts_one_by_one(weights, bias, ids, at, before, config)
        told = ids.clone()
        told[at + 2 : at + 2 + DEPTH] = torch.tensor(wanted)  # later tokens change no draft
        right = accepted(weights, bias, told, torch.tensor([at]), before, config)
        assert right.tolist() == [[True] * DEPTH]
        told[at + 3] = (told[at + 3] + 1) % 11
        right = accepted(weights, bias, told, torch.tensor([at]), before, config)
        assert right.tolist() == [[True] + [False] * (DEPTH - 1)]
        depths.append(wanted)
    assert len(set(map(tuple, depths))) > 1


def test_a_checkpoint_of_noise_is_measured_without_an_error(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    shares = measure(tmp_path, 1, longest=1200)
    assert set(shares) == {"before norm", "after norm"}
