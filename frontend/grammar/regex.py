"""Regular expressions -> right-linear EBNF rules. A pattern always matches from begin to end.

Python's own parser reads the pattern; sets such as \\d and \\w are ASCII. Look-around, back
references and word boundaries, which no grammar can express, are refused; so are patterns that
need too many states.
"""

import re
from collections.abc import Callable
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as reader  # type: ignore[attr-defined]
from typing import Any

from .ebnf import Ranges, Rules, char_class, chars, complement, union
from .problems import SourceError

MAX_STATES = 4096  # of one pattern
MAX_REPEAT = 1024
Alternatives = list[str]
CharWriter = Callable[[Ranges], Alternatives]

DIGITS: Ranges = [(0x30, 0x39)]
_WORD = union(DIGITS, [(0x41, 0x5A), (0x61, 0x7A), (0x5F, 0x5F)])
_SPACE = chars(" \t\n\r\f\v")
_CATEGORIES = {
    op.CATEGORY_DIGIT: DIGITS,
    op.CATEGORY_NOT_DIGIT: complement(DIGITS),
    op.CATEGORY_WORD: _WORD,
    op.CATEGORY_NOT_WORD: complement(_WORD),
    op.CATEGORY_SPACE: _SPACE,
    op.CATEGORY_NOT_SPACE: complement(_SPACE),
}
_BEGINS = (op.AT_BEGINNING, op.AT_BEGINNING_STRING)
_ENDS = (op.AT_END, op.AT_END_STRING)


def plain_chars(ranges: Ranges) -> Alternatives:
    """How a set of characters is written where text is taken as it is."""
    return [char_class(ranges)] if ranges else []


class PatternWriter:
    """Writes patterns into `rules`. `write_chars` says how one character of a set is spelled
    (in JSON strings some need escapes)."""

    def __init__(self, rules: Rules, write_chars: CharWriter = plain_chars) -> None:
        self._rules = rules
        self._write_chars = write_chars
        self._bodies: dict[str, Alternatives] = {}  # of finished states, to skip empty moves
        self._size = 0

    def write(self, pattern: str, end: str) -> str:
        """A rule for `pattern` followed by `end` (an EBNF expression). Raises SourceError."""
        key = f"pattern {self._write_chars} {end} {pattern}"
        return self._rules.once(key, lambda _: self._pattern(pattern, end))

    def repeat_chars(self, ranges: Ranges, least: int, most: int | None, end: str) -> str:
        """A rule for `least` to `most` (None: any number) characters followed by `end`."""
        node = [(op.IN, [(op.RANGE, pair) for pair in ranges])]
        count = (least, op.MAXREPEAT if most is None else most, node)
        key = f"characters {self._write_chars} {end} {count}"
        return self._rules.once(
            key, lambda _: self._counted(self._repeat(count, self._state([end])))
        )

    def _pattern(self, pattern: str, end: str) -> Alternatives:
        try:
            tree = reader.parse(pattern)
            if tree.state.flags & ~re.UNICODE:
                raise SourceError("flags are not supported in a pattern")
            nodes = _without_anchors(_without_anchors(tree, 0, _BEGINS), -1, _ENDS)
            return self._counted(self._build(nodes, self._state([end])))
        except re.error as error:
            raise SourceError(f"is not a valid pattern: {error}") from None
        except (RecursionError, OverflowError):
            raise SourceError("is nested too deeply or repeats too often") from None

    def _state(self, alternatives: Alternatives) -> str:
        alternatives = self._counted(alternatives)
        name = self._rules.add(alternatives)
        self._bodies[name] = alternatives
        return name

    def _counted(self, alternatives: Alternatives) -> Alternatives:
        alternatives = list(dict.fromkeys(alternatives))
        self._size += max(1, len(alternatives) // 4)
        if self._size > MAX_STATES:
            raise SourceError(f"a pattern or length limit needs more than {MAX_STATES} states")
        return alternatives

    def _build(self, nodes: Any, following: str) -> Alternatives:
        """Alternatives for `nodes` and then rule `following`."""
        nodes = list(nodes)
        if not nodes:
            return self._empty(following)
        for node in reversed(nodes[1:]):
            following = self._state(self._node(node, following))
        return self._node(nodes[0], following)

    def _empty(self, following: str) -> Alternatives:
        return self._bodies.get(following, [following])

    def _node(self, node: tuple[Any, Any], following: str) -> Alternatives:
        kind, value = node
        if kind is op.BRANCH:
            return [a for branch in value[1] for a in self._build(branch, following)]
        if kind is op.SUBPATTERN:
            if value[1] or value[2]:
                raise SourceError("flags are not supported in a pattern")
            return self._build(value[3], following)
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeat(value, following)
        written = self._write_chars(_char_set(kind, value))
        if not written:
            raise SourceError("a set of characters in the pattern can never match")
        return [f"{char} {following}" for char in written]

    def _repeat(self, value: tuple[int, Any, Any], following: str) -> Alternatives:
        least, most, nodes = value
        if least > MAX_REPEAT or (most is not op.MAXREPEAT and most > MAX_REPEAT):
            raise SourceError(f"repeats more than {MAX_REPEAT} times")
        if most is op.MAXREPEAT:
            loop = self._rules.reserve()
            again = [a for a in self._build(nodes, loop) if a != loop]
            alternatives = self._counted(again + self._empty(following))
            self._bodies[loop] = alternatives
            self._rules.define(loop, alternatives)
        else:
            alternatives = self._empty(following)
            for _ in range(most - least):
                after = self._state(alternatives)
                alternatives = self._build(nodes, after) + self._empty(following)
        for _ in range(least):
            alternatives = self._build(nodes, self._state(alternatives))
        return alternatives


def _char_set(kind: Any, value: Any) -> Ranges:
    if kind is op.LITERAL:
        return [(value, value)]
    if kind is op.NOT_LITERAL:
        return complement([(value, value)])
    if kind is op.ANY:
        return complement([(0x0A, 0x0A)])
    if kind is op.CATEGORY:
        return _CATEGORIES[value]
    if kind is op.RANGE:
        low, high = value
        return [(low, high)]
    if kind is op.IN:
        negated = bool(value) and value[0][0] is op.NEGATE
        found = union(*(_char_set(*item) for item in value[negated:]))
        return complement(found) if negated else found
    raise SourceError(f"{str(kind).lower()} is not supported in a pattern")


def _without_anchors(nodes: Any, at: int, anchors: tuple[Any, ...]) -> list[Any]:
    """The pattern without ^ at its begin (`at` 0) or $ at its end (`at` -1), also within groups
    and branches that stand there: as the whole text has to match they change nothing."""
    nodes = list(nodes)
    while nodes and nodes[at][0] is op.AT and nodes[at][1] in anchors:
        del nodes[at]
    if nodes and nodes[at][0] is op.BRANCH:
        branches = [_without_anchors(branch, at, anchors) for branch in nodes[at][1][1]]
        nodes[at] = (op.BRANCH, (None, branches))
    elif nodes and nodes[at][0] is op.SUBPATTERN:
        *flags, inner = nodes[at][1]
        nodes[at] = (op.SUBPATTERN, (*flags, _without_anchors(inner, at, anchors)))
    return list(nodes)
