"""What a model writes, for tests of parsers: as parser input, and what comes out of it."""

import json
import re
from collections.abc import Iterable
from typing import Any

from glimmer.frontend.parsers.deltas import AssistantMessage, Delta, join
from glimmer.frontend.parsers.glm import TAGS, GlmParser, ParserOptions

TAG_IDS = {100 + n: tag for n, tag in enumerate(TAGS)}
_IDS = {tag: token_id for token_id, tag in TAG_IDS.items()}
Piece = tuple[int, str]


class Plain(str):
    """Text whose tags are ordinary characters."""


def lex(*parts: str) -> list[Piece]:
    """Token ids and texts: each tag a token of its own, all other text in one piece."""
    pieces: list[Piece] = []
    for part in parts:
        texts = [part] if isinstance(part, Plain) else re.split(f"({'|'.join(TAGS)})", part)
        is_tag = not isinstance(part, Plain)
        pieces += [(_IDS.get(t, 0) if is_tag else 0, str(t)) for t in texts if t]
    return pieces


def characters(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with each character of ordinary text a token of its own."""
    return [(i, c) for i, t in pieces for c in ([t] if i else t)]


def parse(
    pieces: Iterable[Piece], by_itself: bool = True, **options: Any
) -> tuple[AssistantMessage, list[Delta]]:
    """One reply, parsed: the message and the deltas that make it."""
    parser = GlmParser(ParserOptions(tags=TAG_IDS, **options))
    deltas: list[Delta] = []
    for token_id, text in pieces:
        deltas += parser.feed(token_id, text)
    deltas += parser.finish(by_itself)
    return join(deltas), deltas


def simple(message: AssistantMessage) -> tuple[Any, ...]:
    """Reasoning, content, then (name, arguments) of each call; without ids, which are random."""
    calls = [(call.name, call.arguments) for call in message.tool_calls]
    return message.reasoning, message.content, *calls


def write_call(name: str, arguments: dict[str, Any]) -> list[str]:
    """A call as the chat template writes it, strings as ordinary characters."""
    parts = [f"<tool_call>{name}"]
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts += [f"<arg_key>{key}</arg_key><arg_value>", Plain(text), "</arg_value>"]
    return [*parts, "</tool_call>"]
