"""Deltas join to messages, and neighbours of a kind to one."""

from glimmer.frontend.parsers.deltas import (
    AssistantMessage,
    CallArguments,
    CallStart,
    Content,
    Delta,
    Reasoning,
    ToolCall,
    join,
    merge,
)

DELTAS: list[Delta] = [
    Reasoning("a"),
    Reasoning("b"),
    Content("c"),
    CallStart(0, "x", "f"),
    CallArguments(0, "{"),
    CallArguments(0, "}"),
    CallStart(1, "y", "g"),
    CallArguments(1, "{}"),
    Content("d"),
    Content("e"),
]


def test_join() -> None:
    calls = [ToolCall("x", "f", "{}"), ToolCall("y", "g", "{}")]
    assert join(DELTAS) == AssistantMessage("ab", "cde", calls)
    assert join([]) == AssistantMessage(None, None, [])


def test_neighbours_of_one_kind_merge() -> None:
    assert merge(DELTAS) == [
        Reasoning("ab"),
        Content("c"),
        CallStart(0, "x", "f"),
        CallArguments(0, "{}"),
        CallStart(1, "y", "g"),
        CallArguments(1, "{}"),
        Content("de"),
    ]
    starts: list[Delta] = [CallStart(0, "x", "f"), CallStart(1, "y", "f")]
    assert merge(starts) == starts
    assert merge([]) == []
