"""`glimmer bench serve` from the command line to tables and JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from glimmer.deploy.bench.serve import main
from glimmer.deploy.cli import main as glimmer
from glimmer.shared.errors import StartError
from scripted_server import DONE, RunningServer, text_chunk, usage_chunk, whole_reply

SMALL = ["--input_len", "8", "--output_len", "5", "--num_prompts", "12", "--ignore_eos"]


def bench(server: RunningServer, *flags: str) -> int:
    return main(["--url", server.url, *SMALL, *flags])


def test_the_figures_and_their_origin_are_in_table_and_json(
    scripted: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.pause = 0.002  # without it, a busy machine delivers all chunks of a reply at once
    path = tmp_path / "result.json"
    flags = ["--concurrency", "4", "--api_key", "hush", "--json", str(path), "--details"]
    assert bench(scripted, *flags) == 0
    written = path.read_text()
    whole = json.loads(written)
    assert "hush" not in written
    results = whole["results"]
    assert (results["completed"], results["failed"], results["failures"]) == (12, 0, [])
    assert (results["total_input_tokens"], results["total_output_tokens"]) == (96, 60)
    assert results["max_concurrent_requests"] == 4
    assert scripted.most_running <= 4
    assert len(results["requests"]) == 12
    for name in ("ttft", "tpot", "itl", "e2el"):
        ladder = [results[f"{s}_{name}_ms"] for s in ("median", "p90", "p95", "p99")]
        assert results[f"mean_{name}_ms"] > 0
        assert ladder == sorted(ladder)
    assert whole["server"]["model"] == "scripted"
    assert whole["server"]["info"] == scripted.info
    assert whole["server"]["is_local"] is True
    assert whole["settings"]["num_prompts"] == 12
    assert whole["command"].startswith("glimmer bench serve --url http://127.0.0.1")
    assert {"device", "driver", "python", "commit", "versions"} <= set(whole["environment"])
    out = capsys.readouterr().out
    for words in ("scripted on ", "12, 0", "output tokens/s", "TTFT", "p99", "4 at a time"):
        assert words in out


def test_warm_ups_come_first_and_are_other_prompts(scripted: RunningServer) -> None:
    assert bench(scripted, "--num_warmups", "3") == 0
    prompts = [tuple(body["prompt"]) for body in scripted.bodies]
    assert len(set(prompts)) == 15
    scripted.bodies.clear()
    assert bench(scripted, "--num_warmups", "0") == 0
    assert {tuple(body["prompt"]) for body in scripted.bodies} == set(prompts[3:])


def test_failures_are_shown_and_are_in_no_other_figure(
    scripted: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(body: dict[str, Any]) -> list[bytes]:
        number = len(scripted.bodies)
        return [text_chunk("a")] if number % 3 == 0 else whole_reply(body)

    scripted.script = script
    path = tmp_path / "result.json"
    assert bench(scripted, "--json", str(path), "--num_warmups", "0", "--concurrency", "1") == 1
    results = json.loads(path.read_text())["results"]
    assert (results["completed"], results["failed"]) == (8, 4)
    assert results["total_output_tokens"] == 40
    reason = "the stream broke off: neither finish_reason nor [DONE]"
    assert results["failures"] == [{"reason": reason, "count": 4}]
    out = capsys.readouterr().out
    assert "8, 4" in out
    assert f"4 failed: {reason}" in out


def test_what_makes_figures_doubtful_is_said(
    scripted: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.script = lambda body: [text_chunk("a"), text_chunk("b", "stop"), DONE]
    assert bench(scripted) == 0
    out = capsys.readouterr().out
    assert "the server did not count the tokens of 12 replies: chunks did" in out
    assert "12 replies are shorter than requested, although --ignore_eos was given" in out


def test_drafts_bring_several_tokens_per_chunk(
    scripted: RunningServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chunks = [text_chunk("a"), text_chunk("bcd"), text_chunk("e", "length"), usage_chunk(8, 6)]
    scripted.script = lambda body: [*chunks, DONE]
    path = tmp_path / "result.json"
    assert bench(scripted, "--json", str(path), "--details") == 0
    results = json.loads(path.read_text())["results"]
    assert results["tokens_per_chunk"] == 2
    for row in results["requests"]:
        assert (row["output_tokens"], len(row["itl"])) == (6, 2)
    tpots = [(row["e2el"] - row["ttft"]) / 5 * 1000 for row in results["requests"]]
    assert results["mean_tpot_ms"] == pytest.approx(sum(tpots) / len(tpots))


def test_when_the_warm_up_fails_nothing_is_measured(scripted: RunningServer) -> None:
    scripted.refusal = (400, {"error": {"message": "no such model"}})
    with pytest.raises(StartError, match="nothing was measured: HTTP 400: no such model"):
        bench(scripted)
    assert len(scripted.bodies) == 1
    assert bench(scripted, "--num_warmups", "0") == 1


def test_a_mistake_is_one_line(scripted: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert glimmer(["bench", "serve", "--url", scripted.url, "--num_prompts", "0"]) == 2
    assert capsys.readouterr().err.startswith("glimmer: --num_prompts must be from 1")
    assert glimmer(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
    assert glimmer(["bench", "serve", "--help"]) == 0
    assert "TPOT" in capsys.readouterr().out
