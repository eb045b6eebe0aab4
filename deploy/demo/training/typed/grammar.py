"""Rules with alternatives: `[what is|what's] the weather [like|] in {city}`.

Alternatives may be nested. Fields in braces are left as they are. Training does not use the frames
whose checksums are in `reserved.txt`: those of `tests/deploy/demo/requests` (see `frame_checksum`).
"""

import functools
import random
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ..words import Source

RESERVED = Path(__file__).with_name("reserved.txt")
_MIN_RESERVED_WORDS = 4  # shorter frames, such as "hello" or "{} + {}", are too common
_APOSTROPHES = str.maketrans("", "", "'’")
_Node = tuple["str | tuple[_Node, ...]", ...]  # texts, and alternatives that are nodes


@functools.cache
def _parsed(rule: str) -> _Node:
    node, end = _sequence(rule, 0)
    if end != len(rule):
        raise ValueError(f"a bracket is closed that was not opened: {rule}")
    return node


def _sequence(rule: str, at: int) -> tuple[_Node, int]:
    """The parts of `rule` from `at` up to the next bar or closing bracket, and its index."""
    parts: list[str | tuple[_Node, ...]] = []
    begin = at
    while at < len(rule) and rule[at] not in "|]":
        if rule[at] != "[":
            at += 1
            continue
        parts.append(rule[begin:at])
        alternatives: list[_Node] = []
        while at < len(rule) and rule[at] != "]":
            node, at = _sequence(rule, at + 1)
            alternatives.append(node)
        if at == len(rule):
            raise ValueError(f"a bracket is not closed: {rule}")
        parts.append(tuple(alternatives))
        at += 1
        begin = at
    parts.append(rule[begin:at])
    return tuple(parts), at


def expand(rng: random.Random, rule: str) -> str:
    """A random text of the rule. Raises ValueError if its brackets do not match."""
    return _expanded(rng, _parsed(rule))


def _expanded(rng: random.Random, node: _Node) -> str:
    texts = [
        part if isinstance(part, str) else _expanded(rng, part[int(rng.random() * len(part))])
        for part in node
    ]
    return "".join(texts)


def count(rule: str) -> int:
    """The number of texts that `expand` can return."""
    return _count(_parsed(rule))


def _count(node: _Node) -> int:
    total = 1
    for part in node:
        if not isinstance(part, str):
            total *= sum(map(_count, part))
    return total


def frame_checksum(text: str) -> int | None:
    """The checksum of the words of a frame without its fields. Case, marks and digits make no
    difference. None: the frame is too short to be reserved."""
    text = re.sub(r"\{\w*\}", " ", text.casefold()).translate(_APOSTROPHES)
    words = re.findall(r"[^\W\d_]+", text)
    if len(words) < _MIN_RESERVED_WORDS:
        return None
    return zlib.crc32(" ".join(words).encode())


@functools.cache
def reserved() -> frozenset[int]:
    """Checksums of the frames that training must not use."""
    return frozenset(int(line, 16) for line in RESERVED.read_text().split())


def request_frame(
    s: Source, rules: Sequence[str], change: Callable[[str], str] = lambda text: text
) -> str:
    """A frame of one of the rules after `change`. The last rule of four and more is held out.
    Reserved frames do not occur."""
    held_out = rules[-1:] if len(rules) > 3 else rules
    known = rules[:-1] if len(rules) > 3 else rules
    for _ in range(100):
        frame = expand(s.rng, s.pick(held_out if s.frames_held_out else known))
        frame = change(" ".join(frame.split()))
        if frame_checksum(frame) not in reserved():
            return frame
    raise RuntimeError(f"nearly all frames are reserved: {rules}")
