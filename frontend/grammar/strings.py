"""Characters of JSON strings as EBNF, and patterns for the formats of JSON Schema."""

import json
from typing import Any

from .ebnf import ANY_CHAR, Ranges, char_class, chars, intersect, literal
from .regex import Alternatives

_DATE = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
# Parts no longer than mail allows (RFC 5321 4.5.3.1), or a model that repeats itself never ends.
_EMAIL = r"\w([.+-]?\w){0,31}@[a-z0-9](-?[a-z0-9]){0,30}(\.[a-z]{2,12}){1,4}"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "email": _EMAIL,
}
PLAIN: Ranges = intersect(ANY_CHAR, [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x10FFFF)])
_ESCAPED = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
# Any escape but that of half a surrogate pair, which is JSON but no text.
ANY_ESCAPE = (
    '"\\\\" (["\\\\/bfnrt] | "u" ([0-9A-CEFa-cef] [0-9A-Fa-f] | [Dd] [0-7]) '
    "[0-9A-Fa-f] [0-9A-Fa-f])"
)
QUOTE = literal('"')


def string_chars(ranges: Ranges) -> Alternatives:
    """How one character of a set is written within a JSON string."""
    plain = intersect(ranges, PLAIN)
    letters = "".join(to for char, to in _ESCAPED.items() if intersect(ranges, chars(char)))
    written = [char_class(plain)] if plain else []
    return written + ([f"{literal(chr(92))} {char_class(chars(letters))}"] if letters else [])


def dump(value: Any) -> str:
    """A JSON value as the grammars spell it."""
    return json.dumps(value, ensure_ascii=False)
