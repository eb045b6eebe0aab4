"""Stored tiles: found by shape and tokens, read and written whole, wrong files named."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from glimmer.kernels import tiles
from glimmer.kernels.tiles import (
    FIELDS,
    Table,
    TileChoice,
    asked,
    choose,
    merged,
    read_choices,
    shipped,
    use,
    write_choices,
)

DEFAULT = (9, 9, 9, 9)
CARDS = sorted(p.name for p in (Path(tiles.__file__).parent / "configs").iterdir())


def a_table() -> Table:
    small, large = TileChoice((4, 16, 64, 4), 4.5), TileChoice(())
    return {("linear_few", (128, 64)): {8: small, 32: large}, ("linear_one", (7, 5)): {}}


@pytest.fixture(autouse=True)
def _own_table() -> Iterator[None]:
    yield
    use(None)


@pytest.mark.parametrize(
    ("num_tokens", "tile"),
    [(2, (4, 16, 64, 4)), (8, (4, 16, 64, 4)), (9, ()), (32, ()), (33, DEFAULT)],
)
def test_the_next_larger_number_of_tokens_counts(num_tokens: int, tile: tuple[int, ...]) -> None:
    use(a_table())
    assert choose("linear_few", (128, 64), num_tokens, DEFAULT) == tile


@pytest.mark.parametrize(
    ("op", "shape"), [("linear_few", (128, 65)), ("moe", (128, 64)), ("linear_one", (7, 5))]
)
def test_what_nobody_measured_gets_the_default(op: str, shape: tuple[int, ...]) -> None:
    use(a_table())
    assert choose(op, shape, 8, DEFAULT) == DEFAULT
    assert (op, shape) in asked()


def test_written_choices_are_read_back(tmp_path: Path) -> None:
    table = {key: found for key, found in a_table().items() if found}
    write_choices(tmp_path / "new", table, {"card": "some"})
    assert read_choices(tmp_path / "new") == table
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["linear_few.json"]
    assert read_choices(tmp_path / "nowhere") == {}


def test_new_choices_replace_old_ones() -> None:
    key = ("linear_few", (128, 64))
    both = merged(a_table(), {key: {8: TileChoice(DEFAULT), 2: TileChoice(())}})
    assert list(both[key].items()) == [
        (2, TileChoice(())),
        (8, TileChoice(DEFAULT)),
        (32, TileChoice(())),
    ]
    assert merged({}, a_table()) == a_table()


def test_one_file_must_hold_choices(tmp_path: Path) -> None:
    good = {"shape": [128, 64], "tokens": 8, "tile": [4, 16, 64, 4], "us": 1.5}
    bad: list[object] = [
        [],
        {"fields": ["rows"], "choices": []},
        {"fields": FIELDS["linear_few"]},
        *(
            {"fields": FIELDS["linear_few"], "choices": [good | wrong]}
            for wrong in (
                {"tile": [4, 16, 64]},
                {"tile": [4, 16, 64, 0]},
                {"tile": [4, 16, 64, True]},
                {"tile": "four"},
                {"shape": [128]},
                {"tokens": 1.5},
                {"us": "fast"},
            )
        ),
    ]
    path = tmp_path / "linear_few.json"
    for content in bad:
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"linear_few\.json: not a file of kernel choices"):
            read_choices(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"linear_few\.json"):
        read_choices(tmp_path)


@pytest.mark.parametrize("card", CARDS)
def test_what_comes_with_the_package_covers_the_model(card: str) -> None:
    """The shapes of one whole GLM-4.7-Flash on one card; unknown cards have nothing."""
    table = shipped(card)
    assert {("moe", (65, 1536, 2048, 5)), ("moe_one", (65, 1536, 2048, 5))} <= set(table)
    for shape in ((1344, 2048), (5120, 768), (2048, 5120), (20480, 2048), (2048, 10240)):
        assert table["linear_one", shape]
        assert table["linear_few", shape]
    assert shipped("abacus") == shipped("") == {}
