"""`glimmer bench overhead` runs the whole system and reports what it measured."""

import json
from pathlib import Path

import pytest
from glimmer.deploy.bench.overhead import main
from server import free_port


@pytest.mark.parametrize(("route", "running"), [("generate", 1), ("chat-parsed", 8)])
def test_every_stream_is_whole_and_every_number_is_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], route: str, running: int
) -> None:
    output = tmp_path / "overhead.json"
    flags = ["--running", str(running), "--seconds", "0.2", "--port", str(free_port())]
    flags += ["--route", route]
    assert main([*flags, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["benchmark"] == "overhead"
    assert {"device", "commit", "versions"} <= set(report["environment"])
    results = report["results"]
    assert [r["running"] for r in results] == [running]
    for result in results:
        assert result["tokens"] >= 16 * result["running"]  # else a stream broke: main raises
        assert min(result["tokens_per_s"], result["steps"], result["step_us"]) > 0
        assert {"client", "frontend", "scheduler", "fake_worker"} <= set(result["cpu"])
    assert "scheduler us/step" in capfd.readouterr().out
