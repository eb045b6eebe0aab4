import json
import re

import jsonschema_rs
import pytest
from glimmer.deploy.demo.training.typed.toolbox import (
    Intent,
    intents,
    make_tool,
    make_tools,
    missing_intent,
    request,
    request_several,
)
from glimmer.deploy.demo.training.words import Source


@pytest.mark.parametrize("intent", intents(), ids=lambda intent: intent.name)
def test_requests_name_every_value_and_calls_fit_the_schema(intent: Intent) -> None:
    required = {slot.name for slot in intent.slots if slot.required}
    for ask in intent.asks:
        assert set(re.findall(r"\{(\w+)\}", ask)) == required
    assert all(slot.required or slot.name in intent.tails for slot in intent.slots)
    for seed in range(12):
        s = Source(seed, held_out=bool(seed % 2))
        tool = make_tool(s, intent)
        parameters = json.loads(json.dumps(tool.declaration))["function"]["parameters"]
        text, call = request(s, tool)
        assert jsonschema_rs.is_valid(parameters, call.arguments)
        assert "{" not in text
        for value in call.arguments.values():
            if isinstance(value, str) and parameters["properties"]:
                words = value.split()
                assert words[0] in text or len(value) == 3, (text, value)  # EUR may be "euros"


def test_several_calls_differ_in_one_value() -> None:
    kinds = set()
    for seed in range(200):
        s = Source(seed)
        several = request_several(s, make_tool(s, s.pick(intents())), 2)
        if several is None:
            continue
        text, calls = several
        first, second = (call.arguments for call in calls)
        different = [name for name in first if first[name] != second[name]]
        assert len(different) == 1
        assert first[different[0]] in text
        assert second[different[0]] in text
        kinds.add(calls[0].tool.intent.name)
    assert len(kinds) > 20


def test_tools_of_one_prompt_can_be_told_apart() -> None:
    for seed in range(60):
        s = Source(seed)
        wanted = [s.pick(intents())]
        tools = make_tools(s, wanted, seed % 15)
        assert len({tool.name for tool in tools}) == len(tools)
        names = [tool.intent.name for tool in tools]
        assert len(set(names)) == len(names)
        assert wanted[0].name in names
        alone = [tool.intent.family for tool in tools if tool.intent.is_alone]
        assert len(set(alone)) == len(alone)
        missing = missing_intent(s, tools)
        assert missing is not None
        assert missing.name not in names


def test_all_tools_at_once_leave_no_task_undone() -> None:
    s = Source(1)
    families = {intent.family: intent for intent in intents()}
    every = [make_tool(s, intent) for intent in (*intents(), *families.values())]
    assert missing_intent(s, every) is None
