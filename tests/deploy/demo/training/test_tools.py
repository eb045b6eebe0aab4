import json

from glimmer.deploy.demo.training.tools import (
    ask_for,
    flagged,
    intent_without_tool,
    make_call,
    make_tools,
    tool_result,
)
from glimmer.deploy.demo.training.words import RESULT_KEYS, Source

TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list}


def test_tools_differ_and_calls_fit_their_schemas() -> None:
    kinds = set()
    for seed in range(150):
        s = Source(seed)
        tools = make_tools(s, 5)
        assert len({tool.name for tool in tools}) == 5
        assert len({(tool.verb, tool.object) for tool in tools}) == 5
        for tool in tools:
            call = make_call(s, tool)
            assert set(tool.required) <= set(call.arguments) <= set(tool.properties)
            for name, value in call.arguments.items():
                schema = tool.properties[name]
                kinds.add("enum" if "enum" in schema else schema["type"])
                assert isinstance(value, TYPES.get(schema["type"], dict))
                assert value in schema.get("enum", [value])
    assert kinds == {"string", "integer", "number", "boolean", "array", "object", "enum"}


def test_a_request_names_the_intent_and_every_plain_value() -> None:
    for held_out in (False, True):
        for seed in range(150):
            s = Source(seed, held_out)
            call = make_call(s, make_tools(s, 1)[0])
            text = ask_for(s, call)
            assert call.tool.verb in text.lower()
            for value in call.arguments.values():
                if isinstance(value, str | int | float) and not isinstance(value, bool):
                    assert str(value) in text  # spelled as the call has it


def test_a_declaration_is_an_openai_tool() -> None:
    s = Source(3)
    tool = flagged(s, make_tools(s, 1)[0])
    declared = json.loads(json.dumps(tool.declaration()))
    assert declared["type"] == "function"
    assert declared["function"]["name"] == tool.name
    assert declared["function"]["parameters"]["type"] == "object"
    assert list(tool.properties.values())[-1] == {"type": "boolean"}


def test_what_no_tool_does_is_no_tools_intent() -> None:
    for seed in range(50):
        s = Source(seed)
        tools = make_tools(s, 4)
        missing = intent_without_tool(s, tools)
        assert (missing.verb, missing.object) not in {(t.verb, t.object) for t in tools}


def test_results_hold_what_must_be_said() -> None:
    for seed in range(100):
        content, said, values = tool_result(Source(seed), RESULT_KEYS)
        assert values
        assert all(value in said and value in content for value in values)
