"""Which tile a kernel takes for a shape and a number of tokens: measured choices, by card.

Those that come with the package are in `configs/<card>/<op>.json`, a user's own in a folder of the
same form (`tune.py` makes both). What nobody measured gets the kernel's own default.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

Tile = tuple[int, ...]  # of an op's FIELDS; empty: not this kernel but the library
Shape = tuple[int, ...]

FIELDS = {
    "linear_one": ("rows", "columns", "warps"),
    "linear_few": ("slices", "rows", "columns", "stages"),
    "moe_one": ("up_rows", "up_columns", "up_warps", "down_rows", "down_columns", "down_warps"),
    "moe": (
        *("block_t", "up_block_n", "up_block_k", "up_warps", "up_stages"),
        *("down_block_n", "down_block_k", "down_warps", "down_stages"),
    ),
}
SHAPES = {
    "linear_one": ("n", "k"),
    "linear_few": ("n", "k"),
    "moe_one": ("experts", "width", "hidden", "chosen"),
    "moe": ("experts", "width", "hidden", "chosen"),
}


@dataclass(frozen=True)
class TileChoice:
    """A tile and the microseconds it took (0: not measured)."""

    tile: Tile
    us: float = 0.0


# By op and shape, then by the largest number of tokens that a choice is for.
Table = dict[tuple[str, Shape], dict[int, TileChoice]]


@dataclass
class _State:
    table: Table | None = None  # None: those that come with the package
    asked: set[tuple[str, Shape]] = field(default_factory=set)


_state = _State()


def choose(op: str, shape: Shape, num_tokens: int, default: Tile) -> Tile:
    """The stored tile of the smallest number of tokens that is at least `num_tokens`; `default`
    if there is none."""
    key = (op, shape)
    _state.asked.add(key)
    for most_tokens, found in current().get(key, {}).items():
        if num_tokens <= most_tokens:
            return found.tile
    return default


def current() -> Table:
    """What is chosen from."""
    if _state.table is None:
        _state.table = shipped(card_name())
    return _state.table


def use(table: Table | None) -> None:
    """From here on choose from `table`; None: from what comes with the package."""
    _state.table = None if table is None else merged({}, table)


def asked() -> list[tuple[str, Shape]]:
    """(op, shape) of everything that was chosen so far, sorted."""
    return sorted(_state.asked)


def merged(old: Table, new: Table) -> Table:
    """`old` with the choices of `new` in place of its own, numbers of tokens ascending."""
    table = {key: dict(by_tokens) for key, by_tokens in old.items()}
    for key, by_tokens in new.items():
        table[key] = dict(sorted((table.get(key, {}) | by_tokens).items()))
    return table


def card_name() -> str:
    """The folder name of this process's card; "" without one."""
    if not torch.cuda.is_available():
        return ""
    return torch.cuda.get_device_name().lower().replace(" ", "-").replace("/", "-")


@cache
def shipped(card: str) -> Table:
    """What comes with the package for a card; empty for one that nobody measured."""
    folder = Path(__file__).parent / "configs" / card
    return read_choices(folder) if card else {}


def read_choices(folder: Path) -> Table:
    """The choices of a folder; files of ops that do not exist are passed over. Raises ValueError
    naming the file that does not hold choices, OSError if one cannot be read."""
    table: Table = {}
    for op in FIELDS:
        path = folder / f"{op}.json"
        if not path.exists():
            continue
        try:
            table |= _parse(op, json.loads(path.read_bytes()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a file of kernel choices: {error!r}") from error
    return merged({}, table)


def _parse(op: str, data: Any) -> Table:
    if data["fields"] != list(FIELDS[op]):
        raise ValueError(f"fields {data['fields']}, expected {list(FIELDS[op])}")
    table: Table = {}
    for entry in data["choices"]:
        tile, shape, tokens = tuple(entry["tile"]), tuple(entry["shape"]), entry["tokens"]
        numbers = (*tile, *shape, tokens)
        if not all(type(n) is int and n > 0 for n in numbers):
            raise ValueError(f"{entry}: numbers above 0 are needed")
        if len(shape) != len(SHAPES[op]) or len(tile) not in _lengths(op):
            raise ValueError(f"{entry}: wrong number of numbers")
        table.setdefault((op, shape), {})[tokens] = TileChoice(tile, float(entry.get("us", 0.0)))
    return table


def _lengths(op: str) -> tuple[int, ...]:
    return (0, len(FIELDS[op])) if op == "linear_few" else (len(FIELDS[op]),)


def write_choices(folder: Path, table: Table, made_on: Mapping[str, str]) -> None:
    """One file per op, each written in full or not at all. `made_on`: card and versions."""
    folder.mkdir(parents=True, exist_ok=True)
    for op in sorted({op for op, _ in table}):
        lines = [
            json.dumps({"shape": shape, "tokens": tokens, "tile": found.tile, "us": found.us})
            for (name, shape), by_tokens in sorted(table.items())
            for tokens, found in sorted(by_tokens.items())
            if name == op
        ]
        head = {"made_on": dict(made_on), "shape": SHAPES[op], "fields": FIELDS[op]}
        text = json.dumps(head)[:-1] + ', "choices": [\n' + ",\n".join(lines) + "\n]}\n"
        part = folder / f".{op}.{os.getpid()}.part"
        part.write_text(text)
        part.replace(folder / f"{op}.json")
