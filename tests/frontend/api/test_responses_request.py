"""Bodies of /v1/responses in chat terms: every kind of item, and every refusal."""

from typing import Any

import pytest
from glimmer.frontend.api.responses_request import ResponsesBody, responses_chat
from glimmer.frontend.chat.request import ChatRequest
from glimmer.frontend.engine.constraints import ToolRules
from glimmer.frontend.engine.params import GenerationDefaults, ModelFacts
from glimmer.frontend.wire.body import decode_body, encode_json
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import RequestError
from glimmer.shared.model_spec import load_model_spec

Json = dict[str, Any]
TOOL: Json = {"type": "function", "name": "f", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def facts(tiny_model: Any) -> ModelFacts:
    spec = load_model_spec(tiny_model)
    return ModelFacts(ServeConfig(), spec, GenerationDefaults(), {})


def translate(facts: ModelFacts, **fields: Any) -> ChatRequest:
    body = decode_body(encode_json({"input": "x", **fields}), ResponsesBody)
    return responses_chat(body, facts)


def call(number: int, arguments: str = "{}") -> Json:
    kind = {"type": "function_call", "call_id": f"c{number}", "name": "f"}
    return {**kind, "arguments": arguments, "id": "fc", "status": "completed"}


def thought(text: str) -> Json:
    parts = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": "rs", "summary": [], "content": parts}


def said(text: str) -> Json:
    parts = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "role": "assistant", "content": parts}


def test_tools_that_a_provider_runs_are_left_out(facts: ModelFacts) -> None:
    chat = translate(facts, tools=[{"type": "web_search"}, TOOL, {"type": "custom", "name": "c"}])
    assert chat.tools is not None
    assert [tool["function"]["name"] for tool in chat.tools.tools] == ["f", "c"]
    assert chat.left_out == ("tools.web_search",)
    assert translate(facts, tools=[{"type": "web_search"}]).tools is None


def test_items_become_turns(facts: ModelFacts) -> None:
    items = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        thought("r1"),
        said("t1"),
        call(1, '{"a": 1}'),
        call(2, ""),
        {"type": "function_call_output", "call_id": "c1", "output": "o1"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "o2"}],
        },
        thought("r2"),
        call(3),
        thought("r3"),
        said("t2"),
        said("t3"),
        {"role": "user", "content": "two"},
    ]
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": arguments}}
        for n, arguments in enumerate(({"a": 1}, {}, {}), 1)
    ]
    assert translate(facts, input=items, instructions="first").messages == [
        {"role": "system", "content": "first"},
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "one"},
        {
            "role": "assistant",
            "content": "t1",
            "reasoning_content": "r1",
            "tool_calls": calls[:2],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "o1"},
        {"role": "tool", "tool_call_id": "c2", "content": "o2"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "r2",
            "tool_calls": calls[2:],
        },
        {"role": "assistant", "content": "t2", "reasoning_content": "r3"},
        {"role": "assistant", "content": "t3", "reasoning_content": ""},
        {"role": "user", "content": "two"},
    ]


def test_tools_and_sampling(facts: ModelFacts) -> None:
    chat = translate(
        facts,
        tools=[TOOL],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop="zz",
        reasoning={"effort": "none", "summary": "auto"},
        prompt_cache_key="k",
        include=["reasoning.encrypted_content"],
    )
    function = {"name": "f", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    assert chat.tools == ToolRules(tools, "required", "f", parallel=False)
    sampling = chat.spec.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.seed) == (9, 0.5, 3)
    assert (sampling.top_p, sampling.num_logprobs) == (0.9, -1)
    assert chat.spec.text.stop_strings == ("zz",)
    assert chat.template_kwargs["enable_thinking"] is False
    assert chat.split_reasoning


def test_some_of_the_tools_are_allowed(facts: ModelFacts) -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
    chat = translate(facts, tools=[TOOL, {**TOOL, "name": "g"}], tool_choice=choice)
    assert chat.tools is not None
    assert (chat.tools.choice, chat.tools.callable_names) == ("auto", {"f"})


def test_logprobs(facts: ModelFacts) -> None:
    assert translate(facts, top_logprobs=3).spec.sampling.num_logprobs == 3
    include = ["message.output_text.logprobs"]
    assert translate(facts, include=include).spec.sampling.num_logprobs == 0


WRONG: list[tuple[Json, str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": ["x"]}, "input[0]"),
    ({"input": [{}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [5]}]}, "input[0].content[0]"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input[0].content[0].text",
    ),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
    ({"previous_response_id": "r"}, "previous_response_id"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"truncation": "old"}, "truncation"),
    ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{**TOOL, "parameters": "x"}]}, "tools[0].parameters"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "often"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "g"}, "tools": [TOOL]}, "tool_choice"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"reasoning": {"effort": "vast"}}, "reasoning.effort"),
]


@pytest.mark.parametrize(("fields", "field"), WRONG)
def test_the_wrong_field_is_named(facts: ModelFacts, fields: Json, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        translate(facts, **fields)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)
