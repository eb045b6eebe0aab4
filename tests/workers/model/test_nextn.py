"""The draft layer is one decoder layer after a projection of two normed inputs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.deploy.demo.checkpoint import make_checkpoint
from glimmer.kernels.dense.linear import rms_norm
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.inputs import build_batch
from glimmer.workers.model.glm4_moe_lite import ModelWeights, hidden_states
from glimmer.workers.model.nextn import draft_ids, nextn_states
from glimmer.workers.parallel import Ranks
from glimmer.workers.rows import RowTable
from glimmer.workers.weights.checkpoint import check_draft, check_weights
from glimmer.workers.weights.weights import load_weights

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelWeights]:
    path: Path = tmp_path_factory.mktemp("nextn")
    make_checkpoint(path, seed=1)
    spec = load_model_spec(path)
    told = check_draft(ServeConfig(model_dir=str(path), mtp_mode="eagle_with_att"), spec)
    index = check_weights(path, spec)
    report: Any = lambda *_: None  # noqa: E731
    return spec, load_weights(index, spec, Ranks(), torch.float32, "cpu", 1, report, told)


def inputs_of(ids: list[int], vocab: int) -> Any:
    table = RowTable(1, 4, 8, vocab, "cpu")
    admit = RowAdmit(0, SamplingParams(max_new_tokens=9), [0, 1], 0, 0, [])
    table.apply(StepPlan(0, 0, [], [admit], [], [], []))
    chunk = PrefillChunk(0, 0, ids, sample=True)
    return build_batch(StepPlan(0, 0, [], [], [], [chunk], []), table).inputs


def test_each_half_of_the_joint_gets_its_own_input(parts: tuple[Any, ModelWeights]) -> None:
    spec, model = parts
    nextn = model.nextn
    assert nextn is not None
    width, eps = spec.hidden_size, spec.rms_norm_eps
    hidden = torch.randn(len(IDS), width)
    kv = torch.zeros(2, 4, 1, 8, spec.latent_dim).unbind()
    one, nothing = torch.eye(width), torch.zeros(width, width)
    of_tokens = dataclasses.replace(nextn, eh_proj=torch.cat((one, nothing), 1))
    of_states = dataclasses.replace(nextn, eh_proj=torch.cat((nothing, one), 1))
    for joint, table, ids in (
        (of_tokens, rms_norm(nextn.embedding, nextn.enorm, eps), IDS),
        (of_states, rms_norm(hidden, nextn.hnorm, eps), list(range(len(IDS)))),
    ):
        inputs = inputs_of(IDS, spec.vocab_size)
        found = nextn_states(joint, inputs, hidden, kv[0][:, 0])
        alone = dataclasses.replace(
            model, embedding=table, layers=[nextn.layer], norm=nextn.norm, head=nextn.head
        )
        wanted = hidden_states(alone, inputs_of(ids, spec.vocab_size), kv[1])
        for left, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kv[0], kv[1], atol=1e-5, rtol=1e-5)


def test_ids_without_a_token_are_no_drafts(parts: tuple[Any, ModelWeights]) -> None:
    spec, model = parts
    assert model.nextn is not None
    normed = model.nextn.head[[5, spec.num_token_ids, 7]] * 100
    ids = draft_ids(model.nextn, normed)
    assert ids[[0, 2]].tolist() == [5, 7]
    assert ids.max() < spec.num_token_ids
