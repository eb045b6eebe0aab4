import json
import re

import pytest
from glimmer.deploy.demo.training.asked import says, tells_limits
from glimmer.deploy.demo.training.typed.mix import (
    TYPED_KINDS,
    long_dialogue,
    training_dialogue,
    typed_dialogue,
)
from glimmer.deploy.demo.training.typed.talk import LIMITS, limit_turn, talk_turn
from glimmer.deploy.demo.training.typed.texts import text_turn
from glimmer.deploy.demo.training.typed.turns import NO_TOOL
from glimmer.deploy.demo.training.words import Source


@pytest.mark.parametrize("kind", TYPED_KINDS)
def test_dialogues_are_chat_requests_and_replies(kind: str) -> None:
    for seed in range(80):
        item = typed_dialogue(seed, held_out=bool(seed % 2), kind=kind)
        roles = [m["role"] for m in item.messages]
        assert roles[-1] == "assistant"
        offered = {tool["function"]["name"] for tool in item.tools}
        for number, message in enumerate(item.messages):
            calls = message.get("tool_calls", [])
            assert {call["function"]["name"] for call in calls} <= offered
            results = roles[number + 1 : number + 1 + len(calls)]
            assert not calls or number == len(roles) - 1 or results == ["tool"] * len(calls)
            assert message["content"] or calls
        for text in item.must_say:
            assert text in item.messages[-1]["content"]
        first = item.messages[item.first_reply]
        assert kind not in ("typed call", "typed calls", "agent") or first["tool_calls"]
        assert kind != "typed no call" or not first.get("tool_calls")
        assert typed_dialogue(seed, held_out=bool(seed % 2), kind=kind) == item


def test_an_agent_takes_several_steps() -> None:
    steps = {
        sum("tool_calls" in m for m in d.messages[d.first_reply :])
        for d in (typed_dialogue(seed, kind="agent") for seed in range(100))
    }
    assert steps >= {1, 2, 3}


def test_limits_are_told_in_one_sentence_that_is_judged_as_such() -> None:
    assert tells_limits(LIMITS)
    assert not tells_limits(NO_TOOL)
    texts = {limit_turn(Source(seed))[0] for seed in range(300)}
    assert len(texts) > 290
    assert not any("{n}" in text or "{a}" in text for text in texts)


def test_known_facts_are_no_limits() -> None:
    turns = [talk_turn(Source(seed)) for seed in range(300)]
    assert not any(tells_limits(answer) for _, _, answer in turns)
    capitals = [turn for turn in turns if "capital" in turn[0].lower()]
    assert capitals
    assert any(
        says(answer, ["Paris"]) == ("france" in text.lower()) for text, _, answer in capitals
    )


def test_lists_are_sorted_and_counted_right() -> None:
    seen = 0
    for seed in range(1500):
        text, thought, answer = text_turn(Source(seed))
        assert "{" not in text
        if thought == "I sort the list." and answer[0].isdigit():
            numbers = [int(n) for n in answer.rstrip(".").split(", ")]
            assert numbers in (sorted(numbers), sorted(numbers, reverse=True))
            assert sorted(map(int, re.findall(r"\d+", text))) == sorted(numbers)
            seen += 1
        elif thought == "I write JSON.":
            assert json.loads(answer)
        elif thought.startswith("I compare the"):
            numbers = [int(n) for n in re.findall(r"\d+", text)]
            assert int(answer.split()[0]) in (min(numbers), max(numbers))
    assert seen > 50


def test_the_mix_has_every_kind_and_no_dialogue_twice() -> None:
    items = [training_dialogue(f"0-{n}") for n in range(400)]
    kinds = {item.kind for item in items}
    assert kinds == {*TYPED_KINDS, "chat", "call", "parallel", "no_call", "result"}
    assert len({str(item) for item in items}) == len(items)
    assert training_dialogue("0-7") == items[7]


def test_long_dialogues_are_long() -> None:
    lengths = [sum(len(m["content"]) for m in long_dialogue(f"{n}").messages) for n in range(12)]
    assert min(lengths) > 8_000
    assert max(lengths) > 60_000
