"""The benchmark of ops names what it lacks, and on a GPU it times every op of a step."""

import json
from pathlib import Path

import pytest
from glimmer.deploy.bench.kernels import main
from glimmer.deploy.bench.report import gpus
from glimmer.deploy.demo.checkpoint import make_checkpoint
from glimmer.shared.errors import ConfigError, UsageError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path)
    return path


def test_sizes_are_checked(model_dir: Path) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        main(["--model_dir", str(model_dir), "--decode", "0"])


@pytest.mark.skipif(bool(gpus()), reason="has a GPU")
def test_without_a_card_it_says_so(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        main(["--model_dir", str(model_dir)])


@pytest.mark.gpu
def test_every_op_is_timed(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ["--decode", "1", "8", "--prefill", "100", "--context", "100", "--json", str(out)]
    assert main(["--model_dir", str(model_dir), *flags]) == 0
    results = json.loads(out.read_text())["results"]
    for step in ("decode 1", "decode 8", "prefill 100"):
        ops = {r["op"] for r in results if r["step"] == step}
        fused = {"rms_norm", "qkv_a", "q_b", "route"}
        if step == "decode 1":
            fused = {"norm, qkv_a", "norm, q_b", "norm, route"}
        assert fused | {"o", "moe", "dense mlp"} <= ops
    ops = {
        step: {r["op"] for r in results if r["step"] == step} for step in ("decode 1", "decode 8")
    }
    assert {"mla_decode, expanded", "lm_head", "greedy"} <= ops["decode 1"]
    assert {"mla_decode", "expand_values", "lm_head", "greedy"} <= ops["decode 8"]
    assert all(r["us"] > 0 for r in results)
