"""A chat body becomes a request of the pipeline, or is refused by name."""

from typing import Any

import pytest
from glimmer.frontend.chat.request import ChatRequest, chat_request
from glimmer.frontend.engine.constraints import ToolRules
from glimmer.frontend.engine.params import GenerationDefaults, ModelFacts
from glimmer.frontend.wire.schema import ChatBody
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import RequestError
from glimmer.shared.model_spec import load_model_spec
from msgspec import convert

TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def facts(tiny_model: Any) -> ModelFacts:
    return ModelFacts(ServeConfig(), load_model_spec(tiny_model), GenerationDefaults(), {})


def request(facts: ModelFacts, **fields: Any) -> ChatRequest:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    return chat_request(convert(body, ChatBody), facts)


def test_defaults(facts: ModelFacts) -> None:
    chat = request(facts)
    assert chat.messages == [{"role": "user", "content": "x"}]
    assert chat.tools is None
    assert chat.separate_reasoning
    assert chat.template_kwargs == {}
    assert chat.spec.sampling.num_logprobs == -1


def allowed(mode: str, *names: str) -> Any:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolRules([TOOL])),
        ("auto", ToolRules([TOOL])),
        ("none", None),
        ("required", ToolRules([TOOL], "required")),
        ({"type": "function", "function": {"name": "f"}}, ToolRules([TOOL], "required", "f")),
    ],
)
def test_tool_choices(facts: ModelFacts, choice: Any, expected: ToolRules | None) -> None:
    chat = request(facts, tools=[TOOL], tool_choice=choice)
    assert chat.tools == expected


def test_unsupported_fields_may_ask_for_nothing(facts: ModelFacts) -> None:
    request(facts, continue_final_message=False, add_generation_prompt=True, bad_words=[])


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_tools_may_be_declared_and_not_allowed(facts: ModelFacts, mode: str) -> None:
    other = {"type": "function", "function": {"name": "g"}}
    chat = request(facts, tools=[TOOL, other], tool_choice=allowed(mode, "g"))
    assert chat.tools is not None
    assert (chat.tools.choice, chat.tools.name) == (mode, None)
    assert chat.tools.callable_names == {"g"}
    assert chat.tools.tools == [TOOL, other], "the prompt stays the same"


@pytest.mark.parametrize(
    ("fields", "kwargs"),
    [
        ({"chat_template_kwargs": {"thinking": False, "x": 1}},
         {"thinking": False, "enable_thinking": False, "x": 1}),
        ({"chat_template_kwargs": {"enable_thinking": True, "clear_thinking": None}},
         {"thinking": True, "enable_thinking": True}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "none"},
         {"reasoning_effort": "none", "thinking": False, "enable_thinking": False}),
        ({"reasoning_effort": "none", "thinking": {"type": "enabled"}},
         {"reasoning_effort": "none", "thinking": True, "enable_thinking": True}),
        ({"thinking": {"type": "enabled", "clear_thinking": False}},
         {"clear_thinking": False, "thinking": True, "enable_thinking": True}),
        ({"role_settings": {"a": 1}, "character_settings": []},
         {"role_settings": {"a": 1}, "character_settings": []}),
    ],
)  # fmt: skip
def test_template_kwargs(facts: ModelFacts, fields: Any, kwargs: Any) -> None:
    assert request(facts, **fields).template_kwargs == kwargs


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "custom"}, "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        *(
            (
                {"tool_choice": allowed(mode, *names), "tools": [TOOL]},
                f"tool_choice.allowed_tools{more}",
            )
            for mode, names, more in (
                ("none", "f", ""),
                ("auto", "", ""),
                ("auto", "fg", ".tools[1].function.name"),
            )
        ),
        ({"tool_choice": {"type": "function", "function": {"name": 5}}}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
            "tool_choice.function.name",
        ),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"functions": [{}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"chat_template": "x"}, "chat_template"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_refusals(facts: ModelFacts, fields: Any, field: str) -> None:
    with pytest.raises(RequestError) as failure:
        request(facts, **fields)
    assert failure.value.field == field
