"""`glimmer bench overhead` runs the whole system and reports what it measured."""

import json
from pathlib import Path

import pytest
from glimmer.deploy.bench.overhead import main
from server import free_port


def test_every_stream_is_whole_and_every_number_is_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "overhead.json"
    flags = ["--running", "1", "8", "--seconds", "0.2", "--port", str(free_port())]
    assert main([*flags, "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    assert [r["running"] for r in results] == [1, 8]
    for result in results:
        assert result["tokens"] >= 16 * result["running"]  # else a stream broke: main raises
        assert min(result["tokens_per_s"], result["steps"], result["step_us"]) > 0
        assert {"client", "frontend", "scheduler", "fake_worker"} <= set(result["cpu"])
    assert "scheduler us/step" in capfd.readouterr().out
