"""Chat messages are put right for the template, or refused by name."""

from typing import Any

import pytest
from glimmer.frontend.chat.request import check_tools, normalise_messages
from glimmer.shared.errors import RequestError


def test_nulls_go_and_lists_of_text_become_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts, "name": None}]
    assert normalise_messages(messages) == [{"role": "user", "content": "ab"}]
    assert messages[0]["name"] is None, "the client's message is not changed"


def test_text_has_many_names() -> None:
    parts = ["a", {"type": "output_text", "text": "b"}, {"type": "refusal", "refusal": "no"}]
    (message,) = normalise_messages([{"role": "assistant", "content": parts}])
    assert message["content"] == "abno"


def test_a_call_in_the_older_spelling_is_a_call() -> None:
    old = {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    (message,) = normalise_messages([old])
    assert message["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]
    assert "function_call" not in message


def test_roles_that_the_template_does_not_know_are_mapped() -> None:
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "function", "name": "f", "content": "r"},
    ]
    assert [m["role"] for m in normalise_messages(messages)] == ["system", "tool"]


def test_reasoning_is_copied_and_reasoning_content_wins() -> None:
    one = normalise_messages([{"role": "assistant", "reasoning": "r", "content": "c"}])[0]
    assert one["reasoning_content"] == "r"
    both = {"role": "assistant", "reasoning": "r", "reasoning_content": "rc"}
    assert normalise_messages([both])[0]["reasoning_content"] == "rc"


@pytest.mark.parametrize(
    ("given", "expected"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), (None, {}), ("{}", {})],
)
def test_arguments_become_objects(given: Any, expected: Any) -> None:
    calls = [{"id": "x", "function": {"name": "f", "arguments": given}}]
    message = normalise_messages([{"role": "assistant", "tool_calls": calls}])[0]
    assert message["tool_calls"][0]["function"]["arguments"] == expected


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({}, "messages[1].role"),
        ({"role": 5}, "messages[1].role"),
        ({"role": ["user"]}, "messages[1].role"),
        ({"role": "robot", "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "system", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": {"type": "text"}}, "messages[1].content"),
        ({"role": "user", "content": [5]}, "messages[1].content[0]"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
            "messages[1].content[0]",
        ),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[1].content[0].text"),
    ],
)
def test_what_cannot_be_rendered_is_refused_by_name(message: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as failure:
        normalise_messages([{"role": "user", "content": "x"}, message])
    assert failure.value.field == field
    assert field in str(failure.value)


def test_no_messages_is_an_error() -> None:
    with pytest.raises(RequestError, match="messages"):
        normalise_messages([])


def test_tools_keep_their_shape_without_unset_keys() -> None:
    function = {"name": "f", "description": None, "parameters": {"type": "object"}}
    tools = check_tools([{"type": "function", "function": function, "strict": None}])
    expected = {"name": "f", "parameters": {"type": "object"}}
    assert tools == [{"type": "function", "function": expected}]
    assert check_tools([]) is None
    assert check_tools(None) is None


@pytest.mark.parametrize(
    ("tool", "field"),
    [
        ({"type": "custom"}, "tools[0]"),
        ({"type": "custom", "custom": {}}, "tools[0].custom.name"),
        ({"type": "function"}, "tools[0]"),
        ({"type": "function", "function": {}}, "tools[0].function.name"),
        ({"function": {"name": 1}}, "tools[0].function.name"),
        ({"function": {"name": ""}}, "tools[0].function.name"),
        ({"function": {"name": " f"}}, "tools[0].function.name"),
        ({"function": {"name": "f\ng"}}, "tools[0].function.name"),
        ({"function": {"name": "f<arg_key>"}}, "tools[0].function.name"),
        ({"function": {"name": "f" * 257}}, "tools[0].function.name"),
        ({"function": {"name": "f", "parameters": "x"}}, "tools[0].function.parameters"),
    ],
)
def test_bad_tools_are_refused_by_name(tool: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as failure:
        check_tools([tool])
    assert failure.value.field == field
