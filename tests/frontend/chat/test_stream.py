"""Token ids of the real tokenizer -> deltas: the same for every grouping into steps; stop strings
and log-probabilities are those of the content."""

from collections.abc import Callable
from typing import Any

import pytest
from glimmer.frontend.chat.chat import ChatStream
from glimmer.frontend.parsers.deltas import CallArguments, Content, Delta, Reasoning, join
from glimmer.frontend.parsers.glm import TAGS, ParserOptions
from glimmer.frontend.text.detokenize import TextOptions
from glimmer.frontend.text.tokenizer import Tokenizer
from glimmer.shared.messages import TokenLogprob
from hypothesis import given, settings
from hypothesis import strategies as st
from model_text import Plain, simple, write_call

IDS = Callable[[str], list[int]]
TOOLS = {
    "weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "noop": {},
}
CALL = "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo 👍</arg_value></tool_call>"
REPLY = f"why not\n</think>\nLook: \n{CALL}<tool_call>noop</tool_call> done."
END = 524


class Driver:
    """Feeds one stream and keeps what comes out."""

    def __init__(
        self, tokenizer: Tokenizer, text: dict[str, Any] | None = None, max_new: int = 10**6,
        **parsing: Any,
    ) -> None:  # fmt: skip
        ids = tokenizer.vocabulary.added_ids
        options = {"starts_in_reasoning": True, "tools": TOOLS, **parsing}
        parser = ParserOptions(tags={ids[tag]: tag for tag in TAGS}, **options)
        end = frozenset({END})
        wanted = {"stop_token_ids": end, "hidden_ids": end, "skip_special_tokens": True}
        self.stream = ChatStream(
            tokenizer.vocabulary, TextOptions(**{**wanted, **(text or {})}), parser, max_new
        )
        self.deltas: list[Delta] = []
        self.shown: list[int] = []  # ids of the pieces

    def add(self, ids: list[int]) -> list[Delta]:
        logprobs = [TokenLogprob(i, -1.0, 1, []) for i in ids]
        self.stream.add(ids, logprobs)
        return self._take()

    def close(self, reason: str) -> list[Delta]:
        self.stream.close(reason)
        return self._take()

    def _take(self) -> list[Delta]:
        deltas, pieces = self.stream.take()
        self.deltas += deltas
        self.shown += [piece.token_id for piece in pieces]
        return deltas

    @property
    def message(self) -> tuple[Any, ...]:
        return simple(join(self.deltas))


EXPECTED = ("why not", "Look: \n done.", ("weather", '{"city": "Oslo 👍"}'), ("noop", "{}"))


def test_a_reply(tokenizer: Tokenizer, text_ids: IDS) -> None:
    driver = Driver(tokenizer)
    driver.add([*text_ids(REPLY), END, *text_ids("after the end")])
    assert driver.message == EXPECTED
    assert driver.stream.finish_reason == "stop"
    assert not driver.stream.must_abort
    assert driver.stream.num_tokens == len(text_ids(REPLY)) + 1
    assert driver.close("stop") == []


@pytest.mark.parametrize("rest", ["</think>answer", CALL, ""])
def test_reasoning_tokens_are_counted_without_tags(
    tokenizer: Tokenizer, text_ids: IDS, rest: str
) -> None:
    driver = Driver(tokenizer)
    thought = text_ids("why 東 👍\n")  # some of them complete no character
    driver.add([*thought, *text_ids(rest), END])
    assert driver.stream.num_reasoning_tokens == len(thought)


def test_every_grouping_into_steps_gives_the_same(
    tokenizer: Tokenizer, text_ids: IDS, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [*text_ids(REPLY), END]
    for text in ({}, {"stop_strings": ("nowhere",)}, {"record_tokens": True}):
        for at in range(len(ids)):
            driver = Driver(tokenizer, text)
            driver.add(ids[:at])
            driver.add(ids[at:])
            assert driver.message == EXPECTED
        for width in range(1, 9):
            driver = Driver(tokenizer, text)
            for start in range(0, len(ids), width):
                driver.add(ids[start : start + width])
            assert driver.message == EXPECTED
    with capsys.disabled():
        print(f"\nsteps: {len(ids)} tokens, {3 * (len(ids) + 8)} groupings")


VALUES = st.text(st.characters(codec="utf-8") | st.sampled_from('"\\\n👍<>/'), max_size=12)


@settings(max_examples=60)
@given(values=st.lists(VALUES, min_size=1, max_size=3), width=st.integers(1, 7))
def test_any_text_as_tokens_of_any_step_width(
    tokenizer: Tokenizer, values: list[str], width: int
) -> None:
    calls = [part for value in values for part in write_call("weather", {"city": value})]
    ids = plain_ids(tokenizer, ["hm</think>", Plain(values[0] + "."), *calls])
    whole, stepped = Driver(tokenizer), Driver(tokenizer)
    whole.add(ids)
    whole.close("stop")
    for start in range(0, len(ids), width):
        stepped.add(ids[start : start + width])
    stepped.close("stop")
    assert whole.message == stepped.message
    reasoning, content, *made = whole.message
    assert (reasoning, content) == ("hm", (values[0] + ".").lstrip("\n"))
    assert [name for name, _ in made] == ["weather"] * len(values)


def plain_ids(tokenizer: Tokenizer, parts: list[str]) -> list[int]:
    """Ids of the parts; no character of a `Plain` one is part of an added token."""
    ids: list[int] = []
    for part in parts:
        for text in part if isinstance(part, Plain) else [part]:
            ids += tokenizer._encode(str(text), False)
    return ids


def test_text_is_never_held_without_need(tokenizer: Tokenizer, text_ids: IDS) -> None:
    driver = Driver(tokenizer)
    assert driver.add(text_ids("why")) == [Reasoning("why")]
    assert driver.add(text_ids("</think>Hi")) == [Content("Hi")]
    head = driver.add(text_ids("<tool_call>weather<arg_key>"))
    assert [type(delta).__name__ for delta in head] == ["CallStart"]
    assert driver.add(text_ids("city</arg_key><arg_value>")) == [CallArguments(0, '{"city": "')]
    assert driver.add(text_ids("Os")) == [CallArguments(0, "Os")]
    thumb = text_ids("👍")
    assert len(thumb) == 4
    assert [driver.add([i]) for i in thumb] == [[], [], [], [CallArguments(0, "👍")]]
    assert driver.add(text_ids("</arg_value></tool_call>")) == [CallArguments(0, '"}')]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("Look", ("why not", None)),
        ("ok: \n d", ("why not", "Look: \n done.", *EXPECTED[2:])),  # not across a call
        ("k: ", ("why not", "Loo")),
        (" done", ("why not", "Look: \n", *EXPECTED[2:])),
        ("why", EXPECTED),  # in reasoning
        ("Oslo", EXPECTED),  # in a call
        ("city", EXPECTED),
        ("done.!", EXPECTED),
    ],
)
def test_stop_strings_are_looked_for_in_the_content(
    tokenizer: Tokenizer, text_ids: IDS, stop: str, expected: tuple[Any, ...]
) -> None:
    ids = [*text_ids(REPLY), END]
    for width in (1, 3, len(ids)):
        driver = Driver(tokenizer, {"stop_strings": ("zzz", stop)})
        for start in range(0, len(ids), width):
            driver.add(ids[start : start + width])
        assert driver.message == expected
        assert driver.stream.finish_reason == "stop"
        found = expected != EXPECTED and expected[1] != EXPECTED[1]
        assert driver.stream.stop_string == (stop if found else None)
        assert driver.stream.must_abort == found


def test_the_stop_string_that_is_whole_first_counts(tokenizer: Tokenizer, text_ids: IDS) -> None:
    driver = Driver(tokenizer, {"stop_strings": ("bcd", "bc", "abcx")}, starts_in_reasoning=False)
    driver.add(text_ids("zabcde"))
    assert (driver.message[1], driver.stream.stop_string) == ("za", "bc")


def test_joined_reasoning_is_content_to_stop_strings(tokenizer: Tokenizer, text_ids: IDS) -> None:
    options = {"reasoning_as_content": True}
    driver = Driver(tokenizer, {"stop_strings": (" not",)}, **options)
    driver.add(text_ids(REPLY))
    assert driver.message == (None, "why")


def test_stop_strings_are_not_looked_for_before_min_new_tokens(
    tokenizer: Tokenizer, text_ids: IDS
) -> None:
    text = {"stop_strings": ("a",), "min_new_tokens": 3}
    driver = Driver(tokenizer, text, starts_in_reasoning=False)
    driver.add([i for _ in range(4) for i in text_ids("a")])
    assert driver.message[1] == "aa"


def test_a_stop_token_inside_a_call_closes_it_and_length_does_not(
    tokenizer: Tokenizer, text_ids: IDS
) -> None:
    ids = text_ids("</think><tool_call>weather<arg_key>city</arg_key><arg_value>Os")
    stopped = Driver(tokenizer)
    stopped.add([*ids, END])
    assert stopped.message[2:] == (("weather", '{"city": "Os"}'),)
    cut = Driver(tokenizer, max_new=len(ids))
    cut.add(ids)
    assert cut.stream.finish_reason == "length"
    assert cut.message[2:] == (("weather", '{"city": "Os'),)
    aborted = Driver(tokenizer)
    aborted.add(ids)
    aborted.close("abort")
    assert aborted.message[2:] == (("weather", '{"city": "Os'),)


def test_pieces_are_the_tokens_of_the_content(tokenizer: Tokenizer, text_ids: IDS) -> None:
    reply = f"why\n</think>\nLook 👍 {CALL}\n\n<tool_call>noop</tool_call> <tool_call>x done. \n"
    ids = [*text_ids(reply), END]
    for stop, end in (((), "done."), (("ne.",), "do")):
        for width in (1, 2, len(ids)):
            driver = Driver(tokenizer, {"record_tokens": True, "stop_strings": stop})
            for start in range(0, len(ids), width):
                driver.add(ids[start : start + width])
            content = f"Look 👍 \n\n <tool_call>x {end}"
            assert driver.message[1] == content
            text = tokenizer.decode(driver.shown)
            assert text.startswith(content)
            assert len(text) - len(content) <= 2, "more than the last token's rest"


def test_pieces_wait_for_text_that_may_be_a_stop_string(
    tokenizer: Tokenizer, text_ids: IDS
) -> None:
    text = {"record_tokens": True, "stop_strings": ("b!",)}
    driver = Driver(tokenizer, text, starts_in_reasoning=False)
    driver.add(text_ids("a") + text_ids("b"))
    assert driver.shown == text_ids("a")
    driver.add(text_ids("c"))
    assert driver.shown == text_ids("a") + text_ids("b") + text_ids("c")
