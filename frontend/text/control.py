"""Control tokens come from the chat template alone: whatever a client's texts spell is plain text.

Before a template is rendered, `Disguise` replaces the first character of each spelling of an added
token in the client's texts by a stand-in. The template's program takes the texts apart and joins
them as ever, but only its own spellings look like tokens. `plain.py` splits the rendered text at
these and puts the characters back.

Stand-ins are lone surrogates, which no text from a client has: JSON is decoded as UTF-8. A text
that ends with the beginning of a spelling is disguised too, since the next text may complete it.

One field may carry tags: the content of an assistant message without reasoning. Clients that do
not separate reasoning send it back as `<think>reasoning</think>answer`, which templates split.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

_FIRST_STAND_IN = 0xDC00
_MAX_STAND_INS = 0x400
_END, _END_OF_STRING = r"\Z", r'"\s*[,:}\]]'
_OPEN, _CLOSE = "<think>", "</think>"


def stand_ins(tokens: Sequence[str]) -> dict[str, str]:
    """First character of a token's text -> its stand-in. Raises ValueError if there are too
    many."""
    firsts = sorted({token[0] for token in tokens if token})
    if len(firsts) > _MAX_STAND_INS:
        raise ValueError(f"added tokens begin with more than {_MAX_STAND_INS} characters")
    return {first: chr(_FIRST_STAND_IN + n) for n, first in enumerate(firsts)}


class Disguise:
    """Hides spellings of `tokens` from a template and from whatever reads its output."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._stand_ins = stand_ins(tokens)
        # Of a character that JSON need not escape: in strings that are passed on as they came.
        is_ascii = all(map(str.isascii, tokens))
        self._escape = re.compile(rb"\\u00[2-7]" if is_ascii else rb"\\u(?!00[01])")
        written = [json.dumps(token, ensure_ascii=False)[1:-1] for token in tokens]
        branches = [
            f"(?<={re.escape(first)}){_rest(rests, _END_OF_STRING)}"
            for first, rests in _by_first(written).items()
        ]
        firsts = "".join(map(re.escape, {first for text in written for first in text[:1]}))
        in_json = f"[{firsts}](?:{'|'.join(branches)})" if branches else "(?!)"
        self._in_json = re.compile(in_json.encode())
        self._patterns = [
            (re.compile(f"{re.escape(first)}(?={_rest(rests, _END)})"), self._stand_ins[first])
            for first, rests in _by_first(tokens).items()
        ]

    def is_needed(self, arguments: bytes) -> bool:
        """Whether a text in this JSON may spell a token. Never false if one does."""
        if b"\\/" in arguments or (b"\\u" in arguments and self._escape.search(arguments)):
            return True
        return self._in_json.search(arguments) is not None

    def apply(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a template with all of their texts disguised."""
        changed: dict[str, Any] = self._all(arguments)
        for n, message in enumerate(arguments.get("messages") or []):
            if message.get("role") == "assistant":
                changed["messages"][n] |= self._assistant(message)
        return changed

    def _assistant(self, message: dict[str, Any]) -> dict[str, Any]:
        """The content of an assistant's message, if it may have tags."""
        content = message.get("content")
        if not isinstance(content, str) or isinstance(message.get("reasoning_content"), str):
            return {}
        return {"content": self._with_reasoning(content)}

    def _with_reasoning(self, content: str) -> str:
        """Disguised but for the tags around the reasoning at its beginning; the first may lack."""
        reasoning, tag, answer = content.partition(_CLOSE)
        if not tag:
            return self._text(content)
        start = ""
        if reasoning.lstrip().startswith(_OPEN):
            start, _, reasoning = reasoning.partition(_OPEN)
            start += _OPEN
        return start + self._text(reasoning) + tag + self._text(answer)

    def _all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            return {self._text(key): self._all(member) for key, member in value.items()}
        if isinstance(value, list):
            return list(map(self._all, value))
        return value

    def _text(self, text: str) -> str:
        for pattern, stand_in in self._patterns:
            text = pattern.sub(stand_in, text)
        return text


def _by_first(texts: Sequence[str]) -> dict[str, list[str]]:
    """First character -> the rests of the texts that begin with it."""
    rests: dict[str, list[str]] = {}
    for text in filter(None, texts):
        rests.setdefault(text[0], []).append(text[1:])
    return rests


def _rest(texts: Sequence[str], end: str) -> str:
    """A regular expression for any of the texts, and for the beginning of one before `end`."""
    if "" in texts:
        return ""
    branches = [re.escape(first) + _rest(rests, end) for first, rests in _by_first(texts).items()]
    return f"(?:{'|'.join([*branches, end])})"
