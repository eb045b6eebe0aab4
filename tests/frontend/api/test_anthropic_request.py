"""Anthropic's bodies in OpenAI's terms: every kind of block, and every refusal."""

from typing import Any

import pytest
from glimmer.frontend.api.anthropic_request import CountTokensBody, MessagesBody, anthropic_chat
from glimmer.frontend.chat.request import ChatRequest
from glimmer.frontend.engine.constraints import ToolRules
from glimmer.frontend.engine.params import GenerationDefaults, ModelFacts
from glimmer.frontend.wire.body import decode_body, encode_json
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import RequestError
from glimmer.shared.model_spec import load_model_spec

Json = dict[str, Any]
TOOL: Json = {"name": "f", "input_schema": {"type": "object"}}
FUNCTION: Json = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object"}},
}
USER: Json = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def facts(tiny_model: Any) -> ModelFacts:
    spec = load_model_spec(tiny_model)
    return ModelFacts(ServeConfig(), spec, GenerationDefaults(), {})


def translate(facts: ModelFacts, messages: list[Json], **fields: Any) -> ChatRequest:
    body = {"max_tokens": 5, "messages": messages, **fields}
    return anthropic_chat(decode_body(encode_json(body), MessagesBody), facts)


def text(value: str) -> Json:
    return {"type": "text", "text": value, "cache_control": {"type": "ephemeral"}}


def test_every_kind_of_block(facts: ModelFacts) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    secret = {"type": "redacted_thinking", "data": "xx"}
    fine = {"type": "tool_result", "tool_use_id": "t1", "content": [text("a"), text("b")]}
    bad = {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True}
    empty = {"type": "tool_result", "tool_use_id": "t3"}
    chat = translate(
        facts,
        [
            {"role": "user", "content": [text("one"), text("two")]},
            {"role": "assistant", "content": [thinking, secret, text("I"), text("go"), use]},
            {"role": "user", "content": [fine, bad, empty, text("now")]},
            {"role": "assistant", "content": "plain"},
            {"role": "system", "content": "later"},
            {"role": "user", "content": "x"},
        ],
        system=[text("x-anthropic-billing-header: v=1; id=77"), text("s1"), text("s2")],
    )
    call = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert chat.messages == [
        {"role": "system", "content": "s1\ns2"},
        {"role": "user", "content": "one\ntwo"},
        {
            "role": "assistant",
            "content": "I\ngo",
            "reasoning_content": "hm",
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "a\nb"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "now"},
        {"role": "assistant", "content": "plain", "reasoning_content": ""},
        {"role": "system", "content": "later"},
        {"role": "user", "content": "x"},
    ]


def test_only_a_client_header_in_the_system_prompt_is_dropped(facts: ModelFacts) -> None:
    line = "x-anthropic-billing-header: v"
    chat = translate(facts, [{"role": "user", "content": [text(line)]}], system=[text(line)])
    assert chat.messages == [{"role": "user", "content": line}]


def test_sampling(facts: ModelFacts) -> None:
    more = {"metadata": {"user_id": "u"}, "service_tier": "auto", "context_management": {}}
    chat = translate(
        facts,
        [USER],
        stop_sequences=["a", "b"],
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        seed=3,
        **more,
    )
    sampling = chat.spec.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.seed) == (5, 0.5, 3)
    assert (sampling.top_p, sampling.top_k) == (0.9, 7)
    assert chat.spec.text.stop_strings == ("a", "b")
    assert chat.split_reasoning


@pytest.mark.parametrize(
    ("thinking", "enabled"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "enabled", "budget_tokens": 2000}, True),
        ({"type": "adaptive", "display": "summarized"}, True),
    ],
)
def test_thinking(facts: ModelFacts, thinking: Json | None, enabled: bool) -> None:
    chat = translate(facts, [USER], thinking=thinking)
    assert chat.template_kwargs["enable_thinking"] is enabled


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolRules([FUNCTION])),
        (
            {"type": "auto", "disable_parallel_tool_use": True},
            ToolRules([FUNCTION], parallel=False),
        ),
        ({"type": "any"}, ToolRules([FUNCTION], "required")),
        ({"type": "none"}, None),
        (
            {"type": "tool", "name": "f", "disable_parallel_tool_use": False},
            ToolRules([FUNCTION], "required", "f"),
        ),
    ],
)
def test_tool_choice(facts: ModelFacts, choice: Json | None, expected: ToolRules | None) -> None:
    chat = translate(facts, [USER], tools=[{**TOOL, "type": "custom"}], tool_choice=choice)
    assert chat.tools == expected


def test_counting_needs_no_max_tokens(facts: ModelFacts) -> None:
    body = {"messages": [USER, {"role": "assistant", "content": "I"}]}
    chat = anthropic_chat(decode_body(encode_json(body), CountTokensBody), facts)
    assert (len(chat.messages), chat.prefill) == (1, "I")


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
WRONG: list[tuple[Json, str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
        "messages[0].content[0].tool_use_id",
    ),
    ({"messages": [USER, {"role": "assistant", "content": [USE]}]}, "messages"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"system": [IMAGE]}, "system[0]"),
    ({"system": 5}, "system"),
    ({"stop_sequences": ["x"] * 1000}, "stop_sequences"),
    ({"temperature": -1}, "temperature"),
    ({"top_k": -2}, "top_k"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
    ({"tools": [{"name": "", "input_schema": {}}]}, "tools[0].name"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"name": "f", "input_schema": []}]}, "tools[0].input_schema"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "g"}, "tools": [TOOL]}, "tool_choice.name"),
    ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name"),
    ({"tool_choice": {"type": "all"}}, "tool_choice.type"),
    ({"thinking": {"type": "deep"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
    ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
    ({"temperature": 2.5}, "temperature"),
]


def test_a_format_has_an_older_name(facts: ModelFacts) -> None:
    schema: Json = {"type": "json_schema", "schema": {"type": "object"}}
    for fields in ({"output_format": schema}, {"output_config": {"format": schema}}):
        form = translate(facts, messages=[USER], **fields).spec.output_format
        assert form is not None
        assert (form.kind, form.source) == ("json_schema", {"type": "object"})


@pytest.mark.parametrize(("fields", "field"), WRONG)
def test_the_wrong_field_is_named(facts: ModelFacts, fields: Json, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        translate(facts, **{"messages": [USER], **fields})
    assert caught.value.field == field
    assert str(caught.value).startswith(field)
