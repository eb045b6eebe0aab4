import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from glimmer.deploy.demo.checkpoint import tensor_shapes
from glimmer.deploy.demo.training.data import batches
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

SMALL = "--size small --batch_tokens 512 --loaders 0 --tokenizer_dialogues 60 --long_share 0"


def test_a_small_run_learns_and_writes_a_whole_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glimmer.deploy.demo.training.train.SIDES", ("held out",))
    flags = f"{SMALL} --lr 0.1 --steps 25 --log_every 24 --validation 1 --out {tmp_path}/m"
    train(parse(flags.split()))
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


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glimmer.deploy.demo.training.train.report", lambda *_: iter(["shares"]))


@pytest.mark.usefixtures("no_report")
def test_time_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(parse(f"{SMALL} --steps 40 --minutes 1e-9 --out {tmp_path}".split()))
    out = capsys.readouterr().out
    assert "stopped by --minutes 1e-09 at step 0" in out
    assert "final shares" in out


@pytest.mark.usefixtures("no_report")
def test_a_run_goes_on_in_the_next_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"{SMALL} --steps 2 --log_every 1 --out {tmp_path}/m --state {tmp_path}/s".split()
    train(parse([*flags, "--call_minutes", "0"]))
    first = capsys.readouterr().out
    assert "the run is not complete" in first
    assert "step 0" not in first
    train(parse(flags))
    train(parse([*flags[:-4], "--steps", "4", *flags[-4:]]))
    rest = capsys.readouterr().out
    assert [line.split()[1] for line in rest.splitlines() if " loss " in line] == list("0123")
    assert "going on after step 2" in rest


@pytest.mark.usefixtures("no_report")
def test_the_last_part_of_a_run_has_long_dialogues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []

    def made(text: str, size: int, seed: str, workers: int, share: float) -> Any:
        shares.append(share)
        return batches(text, size, seed, workers)

    monkeypatch.setattr("glimmer.deploy.demo.training.train.batches", made)
    flags = f"{SMALL} --steps 4 --long_from 0.5 --long_share 0.25 --out {tmp_path}"
    train(parse(flags.split()))
    assert shares == [0.0, 0.25]


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
