"""Deltas: the parts of an assistant's message, in the order in which they are written.

Every chat route writes these in its own format. They do not depend on whether a reply streams or
how its tokens arrive. Joined (`AssistantMessage`), they are the whole message.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the thinking before the answer. Never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer's text. Never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins. `index` counts the message's calls from 0, `id` is `call_` and 24 hex
    digits, `name` is whole and one of the declared tools."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call `index`, as JSON text. Together the deltas of a call are one
    JSON object, unless the output was cut off inside the call. Never empty."""

    index: int
    text: str


Delta = Reasoning | Content | CallStart | CallArguments


@dataclass(frozen=True)
class ToolCall:
    """One whole call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass
class AssistantMessage:
    """One whole assistant message. None: it has no text of this kind."""

    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


def merge(deltas: list[Delta]) -> list[Delta]:
    """The same deltas with neighbours of one kind joined, so that they are sent as one."""
    if len(deltas) < 2:
        return deltas
    merged: list[Delta] = []
    for (kind, index), run in itertools.groupby(deltas, _kind):
        first, *others = run
        if others and kind is CallArguments:
            texts = [d.text for d in (first, *others) if isinstance(d, CallArguments)]
            merged.append(CallArguments(index, "".join(texts)))
        elif others and (kind is Reasoning or kind is Content):
            texts = [d.text for d in (first, *others) if isinstance(d, Reasoning | Content)]
            merged.append(kind("".join(texts)))
        else:
            merged += [first, *others]
    return merged


def _kind(delta: Delta) -> tuple[type, int]:
    return type(delta), delta.index if isinstance(delta, CallArguments) else 0


def join(deltas: Iterable[Delta]) -> AssistantMessage:
    """The message that the deltas make."""
    reasoning: list[str] = []
    content: list[str] = []
    starts: list[CallStart] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        match delta:
            case Reasoning(text):
                reasoning.append(text)
            case Content(text):
                content.append(text)
            case CallStart():
                starts.append(delta)
                arguments.append([])
            case CallArguments(index, text):
                arguments[index].append(text)
    calls = [
        ToolCall(start.id, start.name, "".join(texts))
        for start, texts in zip(starts, arguments, strict=True)
    ]
    return AssistantMessage("".join(reasoning) or None, "".join(content) or None, calls)
