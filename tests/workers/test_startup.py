"""From a configuration to a ready runner: what loads, what is refused, and with which words."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.errors import ConfigError, ModelError
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.startup import load_runner, num_threads, parse_dtype


def first_token(runner: Any, **values: Any) -> Any:
    """The result of a two-token prompt in row 0."""
    admit = RowAdmit(0, SamplingParams(**{"max_new_tokens": 6, **values}), [0], 0, 0, [])
    chunk = PrefillChunk(0, 0, [1, 2], sample=True)
    return runner.run(StepPlan(0, 5, [], [admit], [], [chunk], []))


def test_dummy_weights_need_no_files(tmp_path: Path, tiny_model: Path, make_runner: Any) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    runners = [make_runner(tmp_path, load_format="dummy") for _ in range(2)]
    one, other = (first_token(runner, num_logprobs=1) for runner in runners)
    assert one == other


@pytest.mark.parametrize("name", ["float32", "fp32", "bfloat16", "bf16", "float16", "fp16"])
def test_each_data_type_runs(tiny_model: Path, make_runner: Any, name: str) -> None:
    assert len(first_token(make_runner(tiny_model, data_type=name)).rows[0].token_ids) == 1


def test_what_cannot_start_says_why(tmp_path: Path, tiny_model: Path, config_of: Any) -> None:
    def load(path: Path, **changes: Any) -> None:
        load_runner(config_of(path, **changes), 0, 0, tmp_path, lambda *_: None)

    with pytest.raises(ConfigError, match="'int3' is unknown, use one of float32"):
        load(tiny_model, data_type="int3")
    with pytest.raises(ConfigError, match="--tp 3 must divide"):
        load(tiny_model, tp=3)
    with pytest.raises(ModelError, match=r"no config.json"):
        load(tmp_path)
    assert parse_dtype("bf16") == torch.bfloat16


def test_damaged_weights_are_a_bad_model(
    tmp_path: Path, tiny_model: Path, make_runner: Any
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    for shard in (tmp_path / "model").glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little")
        data[header:] = b"\xff" * (len(data) - header)  # NaN in each format
        shard.write_bytes(data)
    with pytest.raises(ModelError, match="the weights are damaged"):
        make_runner(tmp_path / "model")


def test_tiny_models_run_on_one_thread_and_tp_shares_the_cores(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = load_model_spec(tiny_model)
    large = dataclasses.replace(tiny, hidden_size=2048)
    monkeypatch.setattr("glimmer.workers.startup.usable_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert num_threads(tiny, 1) == 1
    assert num_threads(large, 1) == 6
    assert [num_threads(large, tp) for tp in (2, 4, 16)] == [4, 2, 1]
