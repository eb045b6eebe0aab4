"""The benchmark runs real steps of a rank and reports their time."""

import json
from pathlib import Path

import pytest
from glimmer.deploy.bench import latency
from glimmer.deploy.bench.latency import main
from glimmer.deploy.bench.roofline import gpu_of
from glimmer.shared.errors import UsageError

SERVER = ["--model_dir", "demo", "--device", "cpu", "--max_req_total_len", "2048"]


def test_a_table_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = latency.measure
    monkeypatch.setattr(  # a CPU has no roofline
        latency, "measure", lambda bench, spec, _, args: measure(bench, spec, gpu_of("H100"), args)
    )
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
    assert "%" in capsys.readouterr().out
    made = json.loads(path.read_text())
    assert made["benchmark"] == "latency"
    rows = [(r["kind"], r["rows"], r["tokens"]) for r in made["results"]]
    assert rows == [("prefill", 2, 100), ("decode", 1, 70), ("decode", 3, 40), ("mixed", 2, 50)]
    for result in made["results"]:
        assert result["ms"] > result["roofline_ms"] > 0
        rows, tokens = result["rows"], result["tokens"]
        count = {"prefill": rows * tokens, "decode": rows, "mixed": rows + tokens}[result["kind"]]
        assert result["tokens_per_s"] == pytest.approx(count / result["ms"] * 1e3)
        assert result["experts"] >= 1


EVERY_KIND = "--decode 1x20 6x20 --mixed 2x30+50 --prefill 1x9 --drafts 0 2"


@pytest.mark.parametrize(
    ("mode", "shapes", "num_drafts"),
    [
        ("eagle_with_att", EVERY_KIND, [0, 2] * 4),
        ("vanilla_with_att", "--decode 6x20 --drafts 2", [2]),
    ],
    ids=["eagle", "vanilla"],
)
def test_steps_with_and_without_drafts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    shapes: str,
    num_drafts: list[int],
) -> None:
    """Half of the first drafts are forced to be accepted, and a quarter of the second ones."""
    path = tmp_path / "out.json"
    flags = [*shapes.split(), "--steps", "16", "--repeats", "1", "--json", str(path)]
    drafts = ["--mtp_mode", mode, "--mtp_step", "2", "--mtp_forced_acceptance", "0.5", "0.25"]
    assert main([*flags, *drafts, "--load_format", "dummy", *SERVER]) == 0
    assert "in drafts" in capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    assert [r["drafts"] for r in results] == num_drafts
    for result in results:
        experts, passes = result["experts"], result["draft_experts"]
        if result["kind"] == "prefill":
            assert (result["tokens_per_row"], passes) == (0, [])
            continue
        each = result["tokens_per_row"]
        if result["kind"] == "decode":
            tokens = result["rows"] * each
            assert result["tokens_per_s"] == pytest.approx(tokens / result["ms"] * 1e3)
            assert len(passes) == result["drafts"]
            least = 2 if result["rows"] * (result["drafts"] + 1) == 1 else 2.1
            assert least <= experts <= 8
            assert all(2 <= n <= 8 for n in passes)
        assert each == (1 if not result["drafts"] else pytest.approx(1.75, abs=0.35))


def test_rows_can_follow_a_schema(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    shapes = "--decode 1x20 4x20 --mixed 2x30+50 --prefill 1x9 --constrained 0 3 --steps 9".split()
    assert main([*shapes, "--repeats", "1", "--json", str(path), *SERVER]) == 0
    results = json.loads(path.read_text())["results"]
    counts = [(r["kind"], r["rows"], r["constrained"]) for r in results]
    assert counts == [
        ("prefill", 1, 0),
        *(("decode", 1, n) for n in (0, 1)),
        *(("decode", 4, n) for n in (0, 3)),
        *(("mixed", 2, n) for n in (0, 2)),
    ]


def test_prompts_can_be_text(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert main(["--decode", "2x40", "--text", "--steps", "1", "--json", str(path), *SERVER]) == 0
    [result] = json.loads(path.read_text())["results"]
    assert result["ms"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--decode", "8"],
        ["--mixed", "2x8"],
        ["--prefill", "0x5"],
        ["--steps", "0"],
        ["--drafts", "1"],
        ["--drafts", "3", "--mtp_mode", "eagle_with_att", "--mtp_step", "2"],
        ["--decode", "1x2100"],
        ["--decode", "--mixed", "8x9+9", "--running_max_req_size", "8"],
        ["--decode", "9x9", "--running_max_req_size", "8"],
    ],
    ids=str,
)
def test_bad_flags_are_named(flags: list[str]) -> None:
    with pytest.raises(UsageError):
        main([*flags, *SERVER])
