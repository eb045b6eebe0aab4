import json
import shutil
import socket
from pathlib import Path

import pytest
from glimmer.deploy.cli import main


def test_a_good_setup_is_all_ok(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--model_dir", str(tiny_model), "--port", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("machine: ")
    assert [line[:4] for line in lines[1:]] == ["ok  "] * len(lines[1:])


def test_every_problem_is_told_and_the_first_gives_the_code(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_to_all = tmp_path / "r"
    open_to_all.mkdir(mode=0o755)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        flags = ["--port", port, "--tp", "3", "--runtime_dir", str(open_to_all)]
        assert main(["check", "--model_dir", str(tiny_model), *flags]) == 3
    bad = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]
    assert len(bad) == 3
    assert "--tp 3" in bad[0]
    assert f"port {port} is in use" in bad[1]
    assert "chmod 700" in bad[2]


def test_a_directory_without_model_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--model_dir", str(tmp_path), "--port", "0"]) == 4
    assert "BAD model directory: " in capsys.readouterr().out


def test_refused_flags_are_told_beside_all_other_problems(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--enable_cpu_cache", "--run_mode", "decode", "--tp", "3", "--port", "0"]
    assert main(["check", "--model_dir", str(tiny_model), *flags]) == 3
    lines = capsys.readouterr().out.splitlines()
    bad = [line for line in lines if line.startswith("BAD")]
    assert len(bad) == 3
    told = {line.split()[2] for line in bad}
    assert {"--enable_cpu_cache", "--run_mode"} < told
    assert "--tp 3" in bad[2]
    assert "ok  tokenizer and defaults" in lines


def test_a_broken_tokenizer_is_told(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m"
    shutil.copytree(tiny_model, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Nonsense"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["check", "--model_dir", str(model), "--port", "0"]) == 4
    assert "BAD tokenizer and defaults: " in capsys.readouterr().out
