"""The benchmark runs true steps through a rank and says what they took."""

import json
from pathlib import Path

import pytest
from glimmer.deploy.bench.latency import main
from glimmer.shared.errors import UsageError

SERVER = ["--model_dir", "demo", "--device", "cpu", "--max_req_total_len", "2048"]


def test_a_table_and_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    flags = [
        "--decode",
        "1x70",
        "3x40",
        "--prefill",
        "2x100",
        "--mixed",
        "2x30+50",
        "--steps",
        "3",
        "--repeats",
        "1",
    ]
    assert main([*flags, "--json", str(path), "--chunked_prefill_size", "64", *SERVER]) == 0
    assert "prefill" in capsys.readouterr().out
    made = json.loads(path.read_text())
    assert made["benchmark"] == "latency"
    rows = [(r["kind"], r["rows"], r["tokens"]) for r in made["results"]]
    assert rows == [("prefill", 2, 100), ("decode", 1, 70), ("decode", 3, 40), ("mixed", 2, 50)]
    for result in made["results"]:
        assert result["ms"] > 0
        rows, tokens = result["rows"], result["tokens"]
        count = {"prefill": rows * tokens, "decode": rows, "mixed": rows + tokens}[result["kind"]]
        assert result["tokens_per_s"] == pytest.approx(count / result["ms"] * 1e3)
        assert result["experts"] >= 1


@pytest.mark.parametrize(
    "flags", [["--decode", "8"], ["--mixed", "2x8"], ["--prefill", "0x5"], ["--steps", "0"]]
)
def test_bad_flags_are_named(flags: list[str]) -> None:
    with pytest.raises(UsageError):
        main([*flags, *SERVER])
