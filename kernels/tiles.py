"""The tile sizes of kernels: measured for each card (GPU model), shape and number of tokens.

Choices that come with the package are in `configs/<card>/<op>.json`; those of a user are in a cache
folder of the same form. `tune.py` makes both. Shapes that were not measured get the default of the
kernel.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

Tile = tuple[int, ...]  # the FIELDS of an op; empty: cuBLAS instead of this kernel
Shape = tuple[int, ...]  # the SHAPES of an op

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
    """A tile and the microseconds that it took (0: not measured)."""

    tile: Tile
    us: float = 0.0


# By op and shape, then by the largest number of tokens that the choice is for, ascending.
Table = dict[tuple[str, Shape], dict[int, TileChoice]]


@dataclass
class _State:
    table: Table | None = None  # None: the choices that come with the package
    asked: set[tuple[str, Shape]] = field(default_factory=set)


_state = _State()


def choose(op: str, shape: Shape, num_tokens: int, default: Tile) -> Tile:
    """The stored tile for the smallest number of tokens that is at least `num_tokens`; `default`
    if there is none."""
    key = (op, shape)
    _state.asked.add(key)
    for max_tokens, choice in current().get(key, {}).items():
        if num_tokens <= max_tokens:
            return choice.tile
    return default


def current() -> Table:
    """The choices in use."""
    if _state.table is None:
        _state.table = shipped(card_name())
    return _state.table


def use(table: Table | None) -> None:
    """Use the choices of `table` from now on; None: those that come with the package."""
    _state.table = None if table is None else merged({}, table)


def asked() -> list[tuple[str, Shape]]:
    """(op, shape) of all tiles that were asked for so far, sorted."""
    return sorted(_state.asked)


def merged(old: Table, new: Table) -> Table:
    """`old`, with the choices of `new` added or replacing its own, sorted by number of tokens."""
    table = {key: dict(by_tokens) for key, by_tokens in old.items()}
    for key, by_tokens in new.items():
        table[key] = dict(sorted((table.get(key, {}) | by_tokens).items()))
    return table


def card_name() -> str:
    """The folder name of the GPU of this process; "" without one."""
    if not torch.cuda.is_available():
        return ""
    return torch.cuda.get_device_name().lower().replace(" ", "-").replace("/", "-")


@cache
def shipped(card: str) -> Table:
    """The choices that come with the package for a card; empty if none were measured."""
    folder = Path(__file__).parent / "configs" / card
    return read_choices(folder) if card else {}


def read_choices(folder: Path) -> Table:
    """The choices in a folder. Files of unknown ops are ignored. Raises ValueError naming the file
    if one does not hold choices, OSError if one cannot be read."""
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
            raise ValueError(f"{entry}: expected integers above 0")
        if len(shape) != len(SHAPES[op]) or len(tile) not in _lengths(op):
            raise ValueError(f"{entry}: wrong number of numbers")
        table.setdefault((op, shape), {})[tokens] = TileChoice(tile, float(entry.get("us", 0.0)))
    return table


def _lengths(op: str) -> tuple[int, ...]:
    return (0, len(FIELDS[op])) if op == "linear_few" else (len(FIELDS[op]),)


def write_choices(folder: Path, table: Table, made_on: Mapping[str, str]) -> None:
    """Write one file per op, each atomically. made_on: card and versions, for the record."""
    folder.mkdir(parents=True, exist_ok=True)
    for op in sorted({op for op, _ in table}):
        lines = [
            json.dumps({"shape": shape, "tokens": tokens, "tile": choice.tile, "us": choice.us})
            for (name, shape), by_tokens in sorted(table.items())
            for tokens, choice in sorted(by_tokens.items())
            if name == op
        ]
        head = {"made_on": dict(made_on), "shape": SHAPES[op], "fields": FIELDS[op]}
        text = json.dumps(head)[:-1] + ', "choices": [\n' + ",\n".join(lines) + "\n]}\n"
        part = folder / f".{op}.{os.getpid()}.part"
        part.write_text(text)
        part.replace(folder / f"{op}.json")
