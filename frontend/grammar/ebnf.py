"""Writing grammars in xgrammar's EBNF: rules with names, literals, sets of characters, tokens.

Matching is fast where a rule reads characters first and ends in another rule (`a ::= [x] b`); a
rule that is called per character makes every mask slow. So strings and patterns are written as
right-linear rules, one per state (`regex.py`).
"""

import re
from collections.abc import Callable, Iterable

from .problems import SourceError, TooLargeError

MAX_RULES = 20_000
SURROGATES = (0xD800, 0xDFFF)
LAST = 0x10FFFF
Ranges = list[tuple[int, int]]  # of code points, both ends included, sorted, disjoint

_TERMINAL = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]')
_OPTIONAL = re.compile(r"\([^()]*\)[*?]")
_RULE = re.compile(r"\br\d+\b")
ANY_CHAR: Ranges = [(0, SURROGATES[0] - 1), (SURROGATES[1] + 1, LAST)]


class Rules:
    """The rules of one grammar. Raises SourceError when there are too many."""

    def __init__(self) -> None:
        self._bodies: dict[str, list[str]] = {}
        self._names: dict[tuple[str, ...], str] = {}  # by alternatives
        self._reserved = 0
        self._keyed: dict[str, str] = {}  # names by keys

    def __len__(self) -> int:
        return self._reserved

    def reserve(self) -> str:
        """A name for a rule that is defined later (recursion)."""
        self._reserved += 1
        if self._reserved > MAX_RULES:
            raise TooLargeError(f"needs more than {MAX_RULES} grammar rules")
        return f"r{self._reserved}"

    def define(self, name: str, alternatives: Iterable[str]) -> str:
        """Define a reserved name; equal alternatives count once. Returns the name."""
        self._bodies[name] = list(dict.fromkeys(alternatives))
        return name

    def add(self, alternatives: Iterable[str]) -> str:
        """A rule with a name of its own choice, the same one for the same alternatives: the
        masks of equal parts are computed once."""
        key = tuple(alternatives)
        if key not in self._names:
            self._names[key] = self.define(self.reserve(), key)
        return self._names[key]

    def once(self, key: str, write: Callable[[str], Iterable[str]]) -> str:
        """The rule that `write` makes when it is given its name, perhaps to refer to itself. Made
        once for each `key`, which has to tell all that it depends on."""
        if key not in self._keyed:
            name = self._keyed[key] = self.reserve()
            self.define(name, write(name))
        return self._keyed[key]

    def text(self, root: list[str]) -> str:
        """The whole grammar, which begins with one of `root`. Raises SourceError if no
        text of it ends."""
        bodies = {"root": root, **self._bodies}
        if "root" not in _that_end(bodies):
            raise SourceError("matches nothing that has an end")
        return "".join(f"{name} ::= {' | '.join(body)}\n" for name, body in bodies.items())


def _that_end(bodies: dict[str, list[str]]) -> set[str]:
    """Rules that match something finite: one of their alternatives needs only such rules."""
    needs = {name: [_needed(text) for text in body] for name, body in bodies.items()}
    users: dict[str, list[str]] = {}
    for name, sets in needs.items():
        for needed in set().union(*sets):
            users.setdefault(needed, []).append(name)
    ending: set[str] = set()
    todo = list(bodies)
    while todo:
        name = todo.pop()
        if name not in ending and any(needed <= ending for needed in needs[name]):
            ending.add(name)
            todo += users.get(name, [])
    return ending


def _needed(alternative: str) -> set[str]:
    """Rules that every text of an alternative needs: those outside optional groups."""
    bare, count = _TERMINAL.sub(" ", alternative), 1
    while count:
        bare, count = _OPTIONAL.subn(" ", bare)
    return set(_RULE.findall(bare))


def literal(text: str) -> str:
    """Exactly this text."""
    return '"' + "".join(_escape(ord(char)) for char in text) + '"'


def token(token_id: int) -> str:
    """Exactly this token, which need not have text."""
    return f"Token({token_id})"


def char_class(ranges: Ranges) -> str:
    """One character of these. `ranges` must not be empty."""
    parts = [_escape(a) if a == b else f"{_escape(a)}-{_escape(b)}" for a, b in ranges]
    return "[" + "".join(parts) + "]"


def union(*sets: Ranges) -> Ranges:
    """Characters that are in any of these."""
    merged: Ranges = []
    for low, high in sorted(pair for ranges in sets for pair in ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def complement(ranges: Ranges) -> Ranges:
    """All characters that are not in these; never a surrogate."""
    result: Ranges = []
    start = 0
    for low, high in union(ranges, [SURROGATES]):
        if low > start:
            result.append((start, low - 1))
        start = high + 1
    if start <= LAST:
        result.append((start, LAST))
    return result


def intersect(a: Ranges, b: Ranges) -> Ranges:
    """Characters that are in both."""
    return complement(union(complement(a), complement(b)))


def chars(text: str) -> Ranges:
    """The characters of a text as a set."""
    return union([(ord(char), ord(char)) for char in text])


def _escape(code: int) -> str:
    char = chr(code)
    if char.isascii() and (char.isalnum() or char == " "):
        return char
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
