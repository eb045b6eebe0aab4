import random

import pytest
from glimmer.deploy.demo.training.asked import load, reserved_frames
from glimmer.deploy.demo.training.typed.grammar import (
    count,
    expand,
    frame_checksum,
    request_frame,
    reserved,
)
from glimmer.deploy.demo.training.typed.talk import limit_rules
from glimmer.deploy.demo.training.typed.toolbox import intents, make_tools, request
from glimmer.deploy.demo.training.words import Source


def test_alternatives_are_nested_and_fields_stay() -> None:
    rule = "[is it [very |]cold|weather] in {city}[?|]"
    texts = {expand(random.Random(n), rule) for n in range(200)}
    starts = ("is it very cold", "is it cold", "weather")
    assert texts == {f"{start} in {{city}}{end}" for start in starts for end in ("?", "")}
    assert count(rule) == len(texts)


@pytest.mark.parametrize("rule", ["[a|b", "a]", "[a|[b|c]", "a|b"])
def test_brackets_must_match(rule: str) -> None:
    with pytest.raises(ValueError, match="bracket"):
        expand(random.Random(0), rule)


def test_the_last_of_four_rules_is_held_out() -> None:
    rules = ("aa", "bb", "cc", "dd")
    assert {request_frame(Source(n), rules) for n in range(60)} == {"aa", "bb", "cc"}
    assert {request_frame(Source(n, True), rules) for n in range(60)} == {"dd"}


def test_checksums_do_not_depend_on_case_marks_or_fields() -> None:
    one = frame_checksum("What's the weather in {city} now?")
    assert one is not None
    assert one == frame_checksum("whats the WEATHER in now")
    assert one != frame_checksum("whats the weather in town now")
    assert frame_checksum("hello you") is None


def test_the_reserved_frames_are_those_of_the_typed_requests() -> None:
    """If this fails: python -m glimmer.deploy.demo.training.asked --reserve"""
    wanted = {frame_checksum(frame) for frame in reserved_frames()} - {None}
    assert reserved() == wanted
    assert len(wanted) > 200


def test_training_uses_no_reserved_frame() -> None:
    asks = {case["ask"].casefold() for cases in load().values() for case in cases}
    long_asks = {ask for ask in asks if frame_checksum(ask) is not None}
    for seed in range(400):
        s = Source(seed)
        text, _ = request(s, s.pick(make_tools(s, [], 1)))
        assert text.casefold() not in long_asks
    rule = "[what is|what's] the weather in {city}?"
    frames = [request_frame(Source(n), ("weather of {city} today please", rule)) for n in range(40)]
    assert all(frame_checksum(frame) not in reserved() for frame in frames)


def test_there_are_thousands_of_frames() -> None:
    assert sum(count(ask) for intent in intents() for ask in intent.asks) > 10_000
    assert sum(map(count, limit_rules())) > 10_000
