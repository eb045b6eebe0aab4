import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from glimmer.deploy.demo.checkpoint import tensor_shapes, trained_config
from glimmer.deploy.demo.training.train import (
    first_that_works,
    learning_rate,
    loss_functions,
    parse,
    train,
)
from glimmer.shared.model_spec import load_model_spec
from glimmer.workers.weights.checkpoint import check_weights
from safetensors.torch import load_file

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
}  # fmt: skip


def small_config(tokenizer: Any) -> dict[str, Any]:
    return trained_config(tokenizer) | SMALL


def test_a_small_run_learns_and_writes_a_whole_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--lr 0.1 --steps 25 --batch_tokens 1024 --loaders 0 --log_every 24 --validation 1"
    args = parse([*flags.split(), "--tokenizer_dialogues", "100", "--out", str(tmp_path / "m")])
    train(args, small_config)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[3]) for line in lines if " loss " in line]
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert losses[0] == pytest.approx(math.log(config["vocab_size"]), rel=0.01)
    assert losses[-1] < losses[0] - 1
    assert any(line.startswith("final held out: chat") for line in lines)
    spec = load_model_spec(tmp_path / "m")
    check_weights(tmp_path / "m", spec)
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    tensors = {k: v for shard in shards for k, v in load_file(shard).items()}
    assert {k: tuple(v.shape) for k, v in tensors.items()} == tensor_shapes(config)
    assert len(shards) == 2


def test_time_ends_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--steps 40 --batch_tokens 512 --loaders 0 --validation 1 --minutes 1e-9"
    monkeypatch.setattr("glimmer.deploy.demo.training.train.report", lambda *_: iter(["shares"]))
    args = parse([*flags.split(), "--tokenizer_dialogues", "50", "--out", str(tmp_path)])
    train(args, small_config)
    assert "stopped by --minutes 1e-09 at step 0" in capsys.readouterr().out


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [learning_rate(step, step / 1000) for step in range(1000)]
    assert rates[0] < rates[100] < rates[200] == rates[300] == 1
    assert rates[500] > rates[900] > rates[999] > 0


def test_a_way_to_compute_the_losses_that_fails_costs_only_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = loss_functions(compiled=False)["plain"]

    def attempt(function: object) -> None:
        if function is not plain:
            raise ValueError("not today")

    functions = {"compiled": functools.partial(plain), "plain": plain}
    assert first_that_works(functions, attempt) is plain
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["losses compiled: ValueError: not today", "losses plain"]
    with pytest.raises(RuntimeError, match="no way"):
        first_that_works({"compiled": functools.partial(plain)}, attempt)
