"""History never makes a request fail: whatever cannot be read becomes a short text."""

import json
from typing import Any

import msgspec
import pytest
from glimmer.frontend.chat.history import call_arguments, text_in
from glimmer.frontend.chat.request import normalise_messages

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x" * 99}}
LINK = {"type": "image_url", "image_url": {"url": "data:image/png;base64,xxxx"}}
DEEP: Any = "x"
for _ in range(3000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ""),
        ("a", "a"),
        (["a", {"type": "output_text", "text": "b"}, {"type": "refusal", "refusal": "c"}], "abc"),
        ([IMAGE, LINK, {"type": "input_image"}], "[image omitted]" * 3),
        ({"type": "input_audio", "input_audio": {}}, "[audio omitted]"),
        ({"type": "document", "title": "T", "source": {"type": "url"}}, "[document omitted: T]"),
        ({"type": "document", "source": {"type": "text", "data": "whole"}}, "whole"),
        ({"type": "document", "source": {"type": "content", "content": [{"text": "a"}]}}, "a"),
        ({"type": "resource", "resource": {"uri": "u", "text": "whole"}}, "whole"),
        ({"type": "tool_reference", "tool_name": "find"}, "[tool omitted: find]"),
        ({"type": "mcp_tool_result", "content": [{"type": "text", "text": "r"}]}, "r"),
        (
            {"type": "web_search_tool_result", "content": [{"type": "hit", "title": "T"}]},
            "[hit omitted: T]",
        ),
        ({"type": "thinking", "thinking": "secret"}, ""),
        ({"type": "k" * 999}, f"[{'k' * 60} omitted]"),
        ({"text": 5}, '{"text":5}'),
        (5, "5"),
        (DEEP, "[deeply nested value omitted]"),
    ],
)
def test_content_becomes_text(content: Any, expected: str) -> None:
    assert text_in(content) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"a": 1}, {"a": 1}),
        ('{"a": "cut of', {"arguments": '{"a": "cut of'}),
        ("[1, 2]", {"arguments": "[1, 2]"}),
        ("plain words", {"arguments": "plain words"}),
        ('{"a": 1e999}', {"arguments": '{"a": 1e999}'}),
        ([1], {"arguments": [1]}),
        (7, {"arguments": 7}),
        ("[" * 100_000, {"arguments": "[" * 100_000}),
        ('{"a": "\\ud83d"}', {"a": "\ufffd"}),
        (
            '{"a": ' + "[" * 200 + "]" * 200 + "}",
            {"arguments": '{"a": ' + "[" * 200 + "]" * 200 + "}"},
        ),
    ],
)
def test_arguments_become_an_object(arguments: Any, expected: Any) -> None:
    assert call_arguments(arguments) == expected


def test_long_arguments_stay_as_they_came() -> None:
    text = json.dumps({"a": "x" * 2000, "b": [1, 2]})
    assert msgspec.json.decode(msgspec.json.encode(call_arguments(text))) == json.loads(text)
    assert call_arguments(text[:-1]) == {"arguments": text[:-1]}
    number = '{"a": 1e999, "b": "' + "x" * 2000 + '"}'
    assert call_arguments(number) == {"arguments": number}


def calls(*made: Any) -> list[Any]:
    message = {"role": "assistant", "tool_calls": list(made)}
    messages = normalise_messages([message, {"role": "user", "content": "x"}])
    return [call["function"] for call in messages[0]["tool_calls"]]


def test_calls_become_functions_with_a_name() -> None:
    patch = {"type": "custom", "id": "1", "custom": {"name": "patch", "input": "*** Begin"}}
    nameless = {"function": {"arguments": "{}"}}
    assert calls(patch, 5, None, nameless, {}) == [
        {"name": "patch", "arguments": {"input": "*** Begin"}},
        {"name": "unknown", "arguments": {}},
        {"name": "unknown", "arguments": {}},
    ]


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"role": "user", "content": [IMAGE, {"type": "text", "text": "b"}]}, "[image omitted]b"),
        ({"role": "user", "content": None}, ""),
        ({"role": "user"}, ""),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, "a"),
        ({"role": "assistant", "content": [LINK], "reasoning": [{"text": "r"}]}, "[image omitted]"),
        ({"role": "assistant", "content": "a", "reasoning_content": 1, "tool_calls": 1}, "a"),
        ({"role": "tool", "content": {"result": 1}}, '{"result":1}'),
    ],
)
def test_messages_before_the_last_are_never_refused(message: Any, content: str) -> None:
    changed, _ = normalise_messages([message, {"role": "user", "content": "new"}])
    assert changed["content"] == content
    assert isinstance(changed.get("reasoning_content", ""), str)


def test_a_new_result_of_a_tool_is_history_too() -> None:
    result = {"role": "tool", "tool_call_id": "1", "content": [LINK]}
    assert normalise_messages([result])[0]["content"] == "[image omitted]"
