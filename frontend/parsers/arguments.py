"""The arguments of one tool call: keys and values -> JSON text, part by part.

    <arg_key>key</arg_key><arg_value>value</arg_value> ... repeated

String values are passed on as they arrive, escaped; other values when they are complete. All parts
together are one JSON object. A key that is written twice is in it twice: JSON readers take the
last.
"""

import json
from enum import Enum, auto
from typing import Any

from .schemas import Schemas
from .values import STRING, ValueType, argument_type

_NULLABLE = frozenset({"string", "null"})


class _State(Enum):
    BETWEEN = auto()  # between two pairs; only whitespace is expected
    KEY = auto()
    AFTER_KEY = auto()
    VALUE = auto()
    # An <arg_key> inside a value: either text, or the next pair after a missing </arg_value>. It
    # is the next pair if </arg_key><arg_value> follow.
    DOUBT = auto()


class Arguments:
    """`text` and `tag` take the model's output in order and return the JSON text that it adds."""

    def __init__(self, parameters: Any) -> None:
        self._schemas = Schemas(parameters)
        self._state = _State.BETWEEN
        self._is_first = True
        self._key = ""
        self._type = ValueType({}, self._schemas)
        self._value: list[str] = []  # text that cannot be passed on yet
        self._streams = False  # the value is a string, and its opening quote was passed on
        self._doubt = ""  # in state DOUBT: the text since that <arg_key>
        self._doubt_key: str | None = None  # the key in it, once </arg_key> has followed

    @property
    def in_value(self) -> bool:
        """Whether most tags are plain text at this position."""
        return self._state in (_State.VALUE, _State.DOUBT)

    def text(self, text: str) -> str:
        """Ordinary text."""
        match self._state:
            case _State.KEY:
                self._key += text
            case _State.AFTER_KEY if text.strip():  # <arg_value> is missing
                return self._open() + self._add(text.lstrip())
            case _State.VALUE:
                return self._add(text)
            case _State.DOUBT:
                self._doubt += text
                if self._doubt_key is not None and text.strip():
                    return self._resolve_as_text()
        return ""

    def tag(self, tag: str) -> str:
        """One of the tags, except those that begin or end a call."""
        match self._state, tag:
            case ((_State.BETWEEN | _State.KEY | _State.AFTER_KEY), "<arg_key>"):
                self._state, self._key = _State.KEY, ""
            case _State.KEY, "</arg_key>":
                self._state = _State.AFTER_KEY
            case ((_State.KEY | _State.AFTER_KEY), "<arg_value>"):
                return self._open()
            case _State.VALUE, "</arg_value>":
                return self._end()
            case _State.VALUE, "<arg_key>":
                self._state, self._doubt, self._doubt_key = _State.DOUBT, tag, None
            case _State.VALUE, _:
                return self._add(tag)
            case _State.DOUBT, _:
                return self._tag_in_doubt(tag)
        return ""

    def close(self) -> str:
        """The call has ended: the rest of the JSON, up to the closing brace."""
        rest = self._resolve_as_text() if self._state is _State.DOUBT else ""
        if self._state is _State.VALUE:
            rest += self._end()
        return rest + ("{}" if self._is_first else "}")

    def _tag_in_doubt(self, tag: str) -> str:
        if tag == "</arg_key>" and self._doubt_key is None:
            self._doubt_key = self._doubt.removeprefix("<arg_key>")
            self._doubt += tag
            return ""
        if tag == "<arg_value>" and self._doubt_key is not None:
            ended = self._end()
            self._key = self._doubt_key
            return ended + self._open()
        return self._resolve_as_text() + self.tag(tag)

    def _resolve_as_text(self) -> str:
        """The <arg_key> was text."""
        self._state = _State.VALUE
        return self._add(self._doubt)

    def _open(self) -> str:
        self._state = _State.VALUE
        self._key = self._key.strip()
        self._type = argument_type(self._schemas, self._key)
        self._value = []
        self._streams = self._type.types == STRING
        return self._head() + '"' if self._streams else ""

    def _head(self) -> str:
        start = "{" if self._is_first else ", "
        self._is_first = False
        return f"{start}{json.dumps(self._key, ensure_ascii=False)}: "

    def _add(self, text: str) -> str:
        if self._streams:
            return _escape(text)
        self._value.append(text)
        if self._type.types == _NULLABLE:  # passed on as well, once it cannot be null
            value = "".join(self._value)
            if not "null".startswith(value.strip().lower()):
                self._streams = True
                return f'{self._head()}"{_escape(value)}'
        return ""

    def _end(self) -> str:
        self._state = _State.BETWEEN
        if self._streams:
            return '"'
        return self._head() + self._type.to_json("".join(self._value))


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
