"""Tuning at start-up: what is measured at which level, what is kept, and on a card that it is."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from glimmer.kernels import tiles, tune
from glimmer.kernels.dense.linear import linear
from glimmer.kernels.tiles import TileChoice, choose, read_choices, use, write_choices

ONE, FEW, MOE = ("linear_one", (96, 64)), ("linear_few", (96, 64)), ("moe", (9, 32, 64, 3))
VERSIONS = {"card": "abacus", "triton": "1.0", "torch": "1.0"}


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    use({})
    yield
    use(None)


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """A card on which every measurement gives (7,) * n; the list holds what was measured."""
    measured: list[tuple[object, ...]] = []

    def measure(op: str, shape: object, num_tokens: int, deadline: float) -> TileChoice | None:
        if time.monotonic() > deadline:
            return None
        measured.append((op, shape, num_tokens))
        return TileChoice((7,) * len(tiles.FIELDS[op]), 1.0)

    monkeypatch.setattr(tune, "tune", measure)
    monkeypatch.setattr(tune, "card_name", lambda: "abacus")
    monkeypatch.setattr(tune, "_versions", lambda: VERSIONS)
    monkeypatch.setattr(tune, "asked", lambda: [ONE])
    return measured


def test_all_that_was_asked_for_is_measured_but_what_is_stored() -> None:
    all_tokens = [(*MOE, tokens) for tokens in tune.TOKENS["moe"]]
    linears = [(*FEW, 8), (*FEW, 32), (*ONE, 1)]
    assert tune.needs([MOE, ONE], {}) == all_tokens + linears
    stored = {
        FEW: {8: TileChoice(())},
        ONE: {1: TileChoice((1, 2, 3))},
        MOE: {8192: TileChoice((1,) * 9)},
    }
    assert tune.needs([MOE, ONE], stored) == [(*FEW, 32)]


def test_level_one_measures_once(tmp_path: Path, a_card: list[tuple[object, ...]]) -> None:
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        tune.use_stored(1, tmp_path)
        tune.tune_asked(1, tmp_path, lambda done, total: seen.append((done, total)))  # noqa: B023
        assert choose(*ONE, 1, ()) == (7, 7, 7)
        assert choose(*FEW, 20, ()) == (7, 7, 7, 7)
        assert len(a_card) == 3
    assert seen == []
    (folder,) = tmp_path.iterdir()
    assert folder.name == "abacus-triton-1.0"
    assert set(read_choices(folder)) == {ONE, FEW}


def test_level_two_measures_again(tmp_path: Path, a_card: list[tuple[object, ...]]) -> None:
    kept = ("linear_one", (5, 5))
    write_choices(
        tmp_path / "abacus-triton-1.0", {key: {1: TileChoice((1, 1, 1))} for key in (ONE, kept)}, {}
    )
    tune.use_stored(2, tmp_path)
    assert choose(*ONE, 1, ()) == (1, 1, 1)
    tune.tune_asked(2, tmp_path, lambda *_: None)
    assert choose(*ONE, 1, ()) == (7, 7, 7)
    assert choose(*kept, 1, ()) == (1, 1, 1)
    assert set(read_choices(tmp_path / "abacus-triton-1.0")) == {ONE, FEW, kept}


@pytest.mark.parametrize(("level", "tile"), [(0, (1, 1, 1)), (3, ())])
def test_the_other_levels_never_measure(
    tmp_path: Path, a_card: list[tuple[object, ...]], level: int, tile: tuple[int, ...]
) -> None:
    write_choices(tmp_path / "abacus-triton-1.0", {ONE: {1: TileChoice((1, 1, 1))}}, {})
    tune.use_stored(level, tmp_path)
    tune.tune_asked(level, tmp_path, lambda *_: None)
    assert choose(*ONE, 1, ()) == tile
    assert a_card == []


def test_a_damaged_file_is_measured_anew(
    tmp_path: Path, a_card: list[tuple[object, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "abacus-triton-1.0"
    folder.mkdir()
    (folder / "linear_one.json").write_text("{}")
    tune.use_stored(1, tmp_path)
    assert "stored kernel tiles are ignored" in caplog.text
    tune.tune_asked(1, tmp_path, lambda *_: None)
    assert set(read_choices(folder)) == {ONE, FEW}


def test_what_time_is_too_short_for_comes_at_the_next_start(
    tmp_path: Path, a_card: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tune, "_SECONDS", -1.0)
        tune.tune_asked(1, tmp_path, lambda *_: None)
    assert a_card == []
    assert choose(*ONE, 1, ()) == ()
    tune.tune_asked(1, tmp_path, lambda *_: None)
    assert len(a_card) == 3


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, a_card: list[tuple[object, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    tune.tune_asked(1, tmp_path / "file", lambda *_: None)
    assert "the tuned tiles cannot be stored" in caplog.text
    assert choose(*ONE, 1, ()) == (7, 7, 7)


@pytest.mark.parametrize("op", list(tiles.FIELDS))
@pytest.mark.parametrize("num_tokens", [16, 64, 1000])
def test_alternatives_are_whole_tiles(op: str, num_tokens: int) -> None:
    shape = (9, 32, 64, 3) if op.startswith("moe") else (96, 64)
    tile = tune.default(op, shape, num_tokens)
    assert len(tile) in (0, len(tiles.FIELDS[op]))
    for span, parts in tune.alternatives(op, tile):
        for part in parts:
            whole = tune.replaced(tile, span, part)
            assert len(whole) == len(tiles.FIELDS[op]) or (op, whole) == ("linear_few", ())


@pytest.mark.parametrize("runs", [{(4, 512, 4): 3.0, (2, 2048, 4): 2.0}, {}])
def test_a_tile_that_fails_is_said_and_loses(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, runs: dict[object, float]
) -> None:
    """Whatever the compiler or the card has against it, and be it the default one."""

    def measure(tile: tune.Tile) -> float:
        if tile not in runs:
            raise RuntimeError(f"no {tile}\nand why")
        return runs[tile]

    caplog.set_level("INFO", tune.logger.name)
    monkeypatch.setitem(tune._OPERANDS, "linear_one", lambda *_: lambda tile: tile)
    monkeypatch.setattr(tune, "_time", measure)
    default = tune.default(*ONE, 1)
    assert default not in runs
    assert tune.tune(*ONE, 1) == (TileChoice((2, 2048, 4), 2.0) if runs else None)
    assert f"linear_one cannot have the tile {default}: RuntimeError: no {default}" in caplog.text
    assert "why" not in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "shape", "num_tokens"), [(*ONE, 1), (*FEW, 8), (*MOE, 16)])
def test_the_card_is_measured(
    tmp_path: Path, op: str, shape: tuple[int, ...], num_tokens: int
) -> None:
    found = tune.tune(op, shape, num_tokens)
    assert found is not None
    assert 0 < found.us < 1e4
    write_choices(tmp_path, {(op, shape): {num_tokens: found}}, {})
    assert read_choices(tmp_path) == {(op, shape): {num_tokens: found}}


@pytest.mark.gpu
def test_what_was_asked_for_is_tuned_on_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune.use_stored(1, tmp_path)
    x, weight = torch.randn(1, 64, device="cuda").bfloat16(), torch.randn(96, 64, device="cuda")
    before = linear(x, weight.bfloat16())
    monkeypatch.setattr(tune, "asked", lambda: [ONE])
    tune.tune_asked(1, tmp_path, lambda *_: None)
    (folder,) = tmp_path.iterdir()
    assert set(read_choices(folder)) == {ONE, FEW}
    torch.testing.assert_close(linear(x, weight.bfloat16()), before)
