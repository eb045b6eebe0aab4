"""The self-test passes with right weights and finds wrong ones, at a stated position."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from glimmer.deploy.cli import main
from glimmer.deploy.demo.run import MODEL_DIR
from glimmer.deploy.golden import write_golden
from glimmer.shared.errors import ConfigError, ModelError
from glimmer.shared.messages import PrefillChunk, Ready, RowAdmit, Shutdown, StepPlan, WorkerFailed
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.self_test import GOLDEN_FILE, self_test
from safetensors.torch import load_file, save_file

EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def golden_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a reference that `glimmer check` wrote."""
    path = tmp_path_factory.mktemp("golden") / "model"
    shutil.copytree(tiny_model, path)
    flags = ["--device", "cpu", "--data_type", "float32", "--port", "0", "--page_size", "16"]
    assert main(["check", str(path), "--write-golden", *flags]) == 0
    return path


def alter(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, shard)
            return
    raise KeyError(name)


def test_a_reference_is_made_on_one_rank(golden_model: Path, config_of: Any) -> None:
    with pytest.raises(ConfigError, match="drop --tp"):
        write_golden(config_of(golden_model, tp=2), load_model_spec(golden_model))


@pytest.mark.parametrize("data_type", ["float32", "bfloat16", "float16"])
def test_right_weights_pass_in_every_type(
    golden_model: Path, make_runner: Any, config_of: Any, data_type: str
) -> None:
    values = {"page_size": 16, "data_type": data_type}
    self_test(make_runner(golden_model, **values), config_of(golden_model, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"max_req_total_len": 2},
        {"max_req_total_len": 20, "running_max_req_size": 1},
        {"batch_max_tokens": 5, "chunked_prefill_size": 3},
        {"max_total_token_num": 32},
        {"mtp_mode": "eagle_with_att", "mtp_step": 2},
        {"load_format": "dummy"},
    ],
)
def test_it_fits_small_servers_and_leaves_rows_free(
    golden_model: Path, make_runner: Any, config_of: Any, values: dict[str, Any]
) -> None:
    values = {"page_size": 16, "data_type": "float32", **values}
    runner = make_runner(golden_model, **values)
    before = first_token(runner)
    self_test(runner, config_of(golden_model, **values))
    assert first_token(runner) == before


def first_token(runner: Any) -> Any:
    admit = RowAdmit(0, SamplingParams(max_new_tokens=1, num_logprobs=1), [0], 0, 0, [])
    result = runner.run(StepPlan(0, 0, [], [admit], [], [PrefillChunk(0, 0, [1], True)], []))
    runner.run(StepPlan(0, 0, [0], [], [], [], []))
    return result


def test_wrong_weights_are_found(
    golden_model: Path, tmp_path: Path, make_runner: Any, config_of: Any
) -> None:
    model, values = tmp_path / "model", {"page_size": 16, "data_type": "float32"}
    shutil.copytree(golden_model, model)
    alter(model, "model.layers.1.self_attn.o_proj.weight", torch.zeros_like)
    runner = make_runner(model, **values)
    with pytest.raises(ModelError, match=r"glimmer_golden\.json: .*output position \d+") as error:
        self_test(runner, config_of(model, **values))
    assert "--verify_checksums" in str(error.value)
    (model / GOLDEN_FILE).unlink()
    self_test(runner, config_of(model, **values))  # they agree with themselves


@pytest.mark.parametrize("data_type", ["float32", "bfloat16"])
def test_the_demo_model_passes_but_not_without_one_of_its_experts(
    tmp_path: Path, make_runner: Any, config_of: Any, data_type: str
) -> None:
    model, values = tmp_path / "model", {"data_type": data_type}
    shutil.copytree(MODEL_DIR, model)
    assert (model / GOLDEN_FILE).exists()
    self_test(make_runner(model, **values), config_of(model, **values))
    alter(model, EXPERT, torch.zeros_like)
    with pytest.raises(ModelError, match=r"differ by .* on average, most at output position \d+"):
        self_test(make_runner(model, **values), config_of(model, **values))


def test_in_float32_a_small_change_of_one_expert_is_found(
    golden_model: Path, tmp_path: Path, make_runner: Any, config_of: Any
) -> None:
    shutil.copytree(golden_model, tmp_path / "model")
    alter(tmp_path / "model", EXPERT, lambda weight: weight * 1.5)
    values = {"page_size": 16, "data_type": "float32"}
    with pytest.raises(ModelError, match=r"output position \d+"):
        self_test(
            make_runner(tmp_path / "model", **values), config_of(tmp_path / "model", **values)
        )


def test_a_kernel_that_depends_on_the_batch_is_found(
    golden_model: Path, make_runner: Any, config_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"page_size": 16, "data_type": "float32"}
    runner = make_runner(golden_model, **values)
    whole = runner.forward.before_sampling

    def wrong_in_a_batch(plan: StepPlan) -> Any:
        forwarded = whole(plan)
        if len(plan.decode) > 1:
            forwarded.logits.copy_(forwarded.logits.roll(1, dims=-1))
        return forwarded

    monkeypatch.setattr(runner.forward, "before_sampling", wrong_in_a_batch)
    with pytest.raises(ModelError, match="alone than in a batch: at output position 0, token"):
        self_test(runner, config_of(golden_model, **values))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda golden: {**golden, "token_ids": [1 << 40]}, "top_logprobs of each"),
        (lambda golden: {**golden, "prompt_ids": [1 << 40]}, "a token id is not in"),
        (lambda golden: {**golden, "prompt_ids": "x"}, "Expected `array`"),
        (lambda golden: {"more": 1, **golden}, "unknown field"),
        (lambda golden: {**golden, "top_logprobs": []}, "top_logprobs of each"),
    ],
)
def test_a_bad_reference_is_a_bad_model(
    golden_model: Path,
    tmp_path: Path,
    make_runner: Any,
    config_of: Any,
    change: Callable[[Any], Any],
    problem: str,
) -> None:
    shutil.copytree(golden_model, tmp_path / "model")
    path = tmp_path / "model" / GOLDEN_FILE
    path.write_bytes(msgspec.json.encode(change(msgspec.json.decode(path.read_bytes()))))
    with pytest.raises(ModelError, match=problem):
        self_test(make_runner(golden_model), config_of(tmp_path / "model"))


def test_a_worker_with_wrong_weights_is_never_ready(
    golden_model: Path, tmp_path: Path, start_group: Any
) -> None:
    shutil.copytree(golden_model, tmp_path / "model")
    alter(tmp_path / "model", "model.norm.weight", torch.zeros_like)
    group = start_group(tmp_path / "model", page_size=16, data_type="float32")
    (failed,) = group.wait_for(WorkerFailed, at="launcher")
    assert failed.reason.startswith("self-test: not the tokens of glimmer_golden.json: at output")
    assert group.exit_codes() == [4]
    assert not [message for message in group.heard_by_launcher if isinstance(message, Ready)]


def test_two_ranks_give_the_tokens_of_the_reference(golden_model: Path, start_group: Any) -> None:
    group = start_group(golden_model, tp=2, page_size=16, data_type="float32")
    assert len(group.wait_for(Ready, 2)) == 2
    group.send(Shutdown(0))
    assert group.exit_codes() == [0, 0]
