"""`glimmer bench overhead` runs the whole system and reports what it measured. `glimmer bench
serve` measures the same system here."""

import asyncio
import json
from pathlib import Path

import pytest
from glimmer.deploy.bench import serve
from glimmer.deploy.bench.overhead import Load, main, serving
from server import free_port

TOKENS_OF_THE_TEMPLATE = 20  # at most, around one user message
SMALL = ["--input_len", "8", "--output_len", "5", "--num_prompts", "12", "--ignore_eos"]


def test_every_stream_is_whole_and_every_number_is_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "overhead.json"
    flags = ["--running", "1", "8", "--seconds", "0.2", "--port", str(free_port())]
    flags += ["--route", "chat-parsed"]
    assert main([*flags, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["benchmark"] == "overhead"
    assert {"device", "commit", "versions"} <= set(report["environment"])
    results = report["results"]
    assert [r["running"] for r in results] == [1, 8]
    for result in results:
        assert result["tokens"] >= 16 * result["running"]  # main raises if a stream breaks
        assert min(result["tokens_per_s"], result["steps"], result["step_us"]) > 0
        assert {"client", "frontend", "scheduler", "fake_worker"} <= set(result["cpu"])
    assert "scheduler us/step" in capfd.readouterr().out


def test_bench_serve_and_plain_streams_measure_the_same_server(tmp_path: Path) -> None:
    port, path = free_port(), tmp_path / "result.json"
    url = f"http://127.0.0.1:{port}"
    chat = ["--route", "chat", "--dataset", "shared-prefix", "--prefix_len", "70"]
    chat += ["--tokenizer", str(tmp_path / "model")]
    with serving(tmp_path / "model", port, []) as server:
        asyncio.run(Load(server, port, "generate").run(2, 40))  # raises if a stream breaks
        for flags, shortest, longest in (
            (["--request_rate", "200"], 8, 8),
            (chat, 78, 78 + TOKENS_OF_THE_TEMPLATE),
        ):
            assert serve.main(["--url", url, *SMALL, *flags, "--json", str(path)]) == 0
            report = json.loads(path.read_text())
            results = report["results"]
            assert (results["completed"], results["total_output_tokens"]) == (12, 60)
            assert shortest <= results["total_input_tokens"] / 12 <= longest
            assert results["counted_by"] == {"usage": 12}
            assert results["short_replies"] == 0
            assert report["server"]["info"]["running_max_req_size"] == 512
            assert report["server"]["info"]["engine"]["num_pages"] > 0
