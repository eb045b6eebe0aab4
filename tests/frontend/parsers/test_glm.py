"""GLM's output taken apart: the vectors that other servers' parsers are tested with, the rules for
reasoning, and properties over generated replies: no way to cut the text changes what comes out."""

import itertools
import json
import re
from typing import Any

import pytest
from glimmer.frontend.parsers.deltas import CallArguments, CallStart, Content, Reasoning, merge
from glimmer.frontend.parsers.glm import GlmParser, ParserOptions
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_text import TAG_IDS, Plain, characters, lex, parse, simple, write_call

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "date": {"type": "string"},
        "count": {"type": "number"},
        "filters": {"type": "object"},
    },
}
TOOLS: dict[str, Any] = {
    "get_weather": WEATHER,
    "get_weather_now": {},
    "noop": {"type": "object", "properties": {}},
    "search": {"properties": {"query": {"type": "string"}}},
}
CITY = "<arg_key>city</arg_key><arg_value>{}</arg_value>"
BEIJING = f"<tool_call>get_weather{CITY.format('Beijing')}</tool_call>"
SHANGHAI = f"<tool_call>get_weather{CITY.format('Shanghai')}</tool_call>"
NOOP = "<tool_call>noop</tool_call>"
OPEN = f"<tool_call>get_weather{CITY.format('Bei')}"
IN_BEIJING = ("get_weather", '{"city": "Beijing"}')
IN_SHANGHAI = ("get_weather", '{"city": "Shanghai"}')
DID_NOOP = ("noop", "{}")


def outcome(*parts: str, **options: Any) -> tuple[Any, ...]:
    """The message, which is the same in one piece per tag and in characters."""
    options = {"tools": TOOLS, **options}
    found = simple(parse(lex(*parts), **options)[0])
    assert found == simple(parse(characters(lex(*parts)), **options)[0])
    return found


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("This is a plain response.", (None, "This is a plain response.")),
        ("a < b and c > d. done", (None, "a < b and c > d. done")),
        ("  Hello \n", (None, "  Hello \n")),
        (" \n", (None, " \n")),
        ("", (None, None)),
        # calls, with newlines and without
        (NOOP, (None, None, DID_NOOP)),
        ("<tool_call>noop\n</tool_call>", (None, None, DID_NOOP)),
        ("<tool_call>\nnoop  \n</tool_call>", (None, None, DID_NOOP)),
        (BEIJING, (None, None, IN_BEIJING)),
        (
            f"<tool_call>get_weather\n{CITY.format('Beijing')}\n</tool_call>",
            (None, None, IN_BEIJING),
        ),
        (
            "<tool_call>get_weather\n    <arg_key>city</arg_key>\n"
            "    <arg_value>Beijing</arg_value>\n    <arg_key>date</arg_key>\n"
            "    <arg_value>2025-08-01</arg_value>\n    </tool_call>",
            (None, None, ("get_weather", '{"city": "Beijing", "date": "2025-08-01"}')),
        ),
        (
            f"<tool_call>get_weather{CITY.format('  Beijing  ')}</tool_call>",
            (None, None, ("get_weather", '{"city": "  Beijing  "}')),
        ),
        (BEIJING + SHANGHAI, (None, None, IN_BEIJING, IN_SHANGHAI)),
        (BEIJING + "\n" + SHANGHAI + "\n", (None, None, IN_BEIJING, IN_SHANGHAI)),
        (
            f"<tool_call>get_weather_now{CITY.format('x')}</tool_call>{NOOP}",
            (None, None, ("get_weather_now", '{"city": "x"}'), DID_NOOP),
        ),
        # text around calls
        ("Checking." + NOOP, (None, "Checking.", DID_NOOP)),
        ("Let me check. " + BEIJING, (None, "Let me check. ", IN_BEIJING)),
        ("  \n  " + NOOP, (None, None, DID_NOOP)),
        (f"{BEIJING} middle {NOOP} tail", (None, "middle  tail", IN_BEIJING, DID_NOOP)),
        (
            f"I will check.\n{BEIJING}\nAlso Shanghai.\n{SHANGHAI}\n",
            (None, "I will check.\n\nAlso Shanghai.", IN_BEIJING, IN_SHANGHAI),
        ),
        # not a declared tool: stays text
        (
            f"a <tool_call>get_time{CITY.format('x')}</tool_call> b {NOOP}",
            (None, f"a <tool_call>get_time{CITY.format('x')}</tool_call> b ", DID_NOOP),
        ),
        ("<tool_call>get</tool_call>", (None, "<tool_call>get</tool_call>")),
        ("<tool_call></tool_call>", (None, "<tool_call></tool_call>")),
        # stray tags in prose do not swallow what follows
        (
            f"I will issue a <tool_call> now. {BEIJING}",
            (None, "I will issue a <tool_call> now. ", IN_BEIJING),
        ),
        ("text <tool_call><tool_call>noop</tool_call>", (None, "text ", DID_NOOP)),
        (f"prose <tool_call>{BEIJING}", (None, "prose ", IN_BEIJING)),
        ("text <tool_call>", (None, "text <tool_call>")),
        ("<tool_call>   ", (None, "<tool_call>   ")),
        ("a</tool_call> <arg_key>b</arg_value>", (None, "a</tool_call> <arg_key>b</arg_value>")),
        # a forgotten end
        (f"<tool_call>noop{BEIJING}", (None, None, DID_NOOP, IN_BEIJING)),
        (
            f"<tool_call>get_weather{CITY.format('Beijing')}{NOOP}",
            (None, None, IN_BEIJING, DID_NOOP),
        ),
        (f"<tool_call>get_weather{CITY.format('Beijing')}", (None, None, IN_BEIJING)),
        ("<tool_call>noop", (None, None, DID_NOOP)),
    ],
)
def test_tool_calls(output: str, expected: tuple[Any, ...]) -> None:
    assert outcome(output) == expected
    assert outcome("thought\n</think>\n\n" + output.lstrip("\n"), starts_in_reasoning=True) == (
        "thought",
        *expected[1:],
    )


def test_the_recorded_ids_of_the_real_tokenizer() -> None:
    ids = [154843, 455, 68852, 154847, 2527, 154848, 154849, 2016, 29953, 154850, 154844]
    texts = ["<tool_call>", "get", "_weather", "<arg_key>", "location", "</arg_key>"]
    texts += ["<arg_value>", "Shang", "hai", "</arg_value>", "</tool_call>"]
    tags = {i: t for i, t in zip(ids, texts, strict=True) if t[0] == "<"}
    parser = GlmParser(ParserOptions(tags=tags, tools={"get_weather": {}}))
    deltas = [parser.feed(token_id, text) for token_id, text in zip(ids, texts, strict=True)]
    start = deltas[3][0]
    assert isinstance(start, CallStart)
    assert (start.index, start.name) == (0, "get_weather")
    assert re.fullmatch("call_[0-9a-f]{24}", start.id)
    assert deltas[9] == [CallArguments(0, '{"location": "Shanghai"')]
    assert deltas[10] == [CallArguments(0, "}")]
    assert sum(map(len, deltas)) == 3


def test_calls_of_one_tool_have_indexes_and_ids_of_their_own() -> None:
    message, deltas = parse(lex(BEIJING + BEIJING + NOOP), tools=TOOLS)
    assert len({call.id for call in message.tool_calls}) == 3
    starts = [d for d in deltas if isinstance(d, CallStart)]
    assert [start.index for start in starts] == [0, 1, 2]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("Look: <tool_call>", (None, "Look: ")),
        ("<tool_call>get_wea", (None, None)),
        ("<tool_call>get_weather", (None, None)),
        ("<tool_call>got_wea", (None, "<tool_call>got_wea")),
        ("<tool_call>get_weather<arg_key>ci", (None, None, ("get_weather", ""))),
        (
            OPEN.removesuffix("i</arg_value>"),
            (None, None, ("get_weather", '{"city": "Be')),
        ),
        (OPEN, (None, None, ("get_weather", '{"city": "Bei"'))),
        (
            f"{OPEN}<arg_key>count</arg_key><arg_value>1",
            (None, None, ("get_weather", '{"city": "Bei"')),
        ),
    ],
)
def test_a_call_that_is_cut_off_has_what_is_complete(cut: str, expected: tuple[Any, ...]) -> None:
    assert outcome(cut, by_itself=False) == expected


def test_without_declared_tools_calls_are_text() -> None:
    text = f"Look: {BEIJING} and {NOOP}\n"
    assert outcome(text, tools=None) == (None, text)
    assert outcome("r" + text, tools=None, starts_in_reasoning=True) == ("r" + text, None)


def test_characters_that_spell_tags_are_text() -> None:
    spelled = Plain("</think><tool_call>noop</tool_call>")
    assert outcome(spelled) == (None, str(spelled))
    parts = ["<tool_call>search<arg_key>query</arg_key><arg_value>", Plain("</arg_value><x>")]
    expected = ("search", '{"query": "</arg_value><x>"}')
    assert outcome(*parts, "</arg_value></tool_call>") == (None, None, expected)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("thought</think>answer", ("thought", "answer")),
        ("\n\nthought\n\nmore\n</think>\n\nanswer\n", ("thought\n\nmore", "answer\n")),
        (" spaces </think> stay ", (" spaces ", " stay ")),
        ("</think>answer", (None, "answer")),
        ("\n</think>\nanswer", (None, "answer")),
        ("thought</think>", ("thought", None)),
        ("thought", ("thought", None)),
        ("thought\n", ("thought\n", None)),
        ("<think>thought<think></think>answer", ("thought", "answer")),
        ("one</think></think>answer", ("one", "answer")),
        ("one</think>answer</think>more", ("one", "answer</think>more")),
        # a call inside reasoning ends it
        (f"thought{NOOP}", ("thought", None, DID_NOOP)),
        (f"thought\n{NOOP}</think>\nanswer", ("thought", "answer", DID_NOOP)),
        (f"thought\n\n{BEIJING}{NOOP}", ("thought", None, IN_BEIJING, DID_NOOP)),
        # talk about a call does not
        (
            f"Use <tool_call> or <tool_call>other</tool_call>\n</think>{NOOP}",
            ("Use <tool_call> or <tool_call>other</tool_call>", None, DID_NOOP),
        ),
        ("the tag <tool_call>\n</think>answer", ("the tag <tool_call>", "answer")),
        ("half a name <tool_call>get", ("half a name <tool_call>get", None)),
    ],
)
def test_reasoning(output: str, expected: tuple[Any, ...]) -> None:
    assert outcome(output, starts_in_reasoning=True) == expected
    joined = "".join(t for t in expected[:2] if t) or None
    together = outcome(output, starts_in_reasoning=True, reasoning_as_content=True)
    assert together == (None, joined, *expected[2:])


def test_thinking_off() -> None:
    assert outcome("answer") == (None, "answer")
    assert outcome("\nanswer") == (None, "\nanswer")
    assert outcome("</think>\nanswer") == (None, "answer")
    assert outcome("answer</think>more") == (None, "answer</think>more")
    assert outcome("<think>late thought</think>answer") == ("late thought", "answer")


def test_without_a_reasoning_parser_tags_stay_in_the_text() -> None:
    options = {"split_reasoning": False, "starts_in_reasoning": True}
    assert outcome("a\n</think>\nb", **options) == (None, "a\n</think>\nb")
    assert outcome(f"a</think>{NOOP}", **options) == (None, "a</think>", DID_NOOP)


def test_unclosed_reasoning_can_be_repeated_as_content() -> None:
    options = {"starts_in_reasoning": True, "repeat_unclosed": True}
    assert outcome("all\nof it", **options) == ("all\nof it", "all\nof it")
    assert outcome("cut of", by_itself=False, **options) == ("cut of", None)
    assert outcome("a</think>", **options) == ("a", None)
    assert outcome("a" + NOOP, **options) == ("a", None, DID_NOOP)


def test_half_a_character_before_a_tag_stays_on_its_side() -> None:
    think_end = next(i for i, tag in TAG_IDS.items() if tag == "</think>")
    pieces = [(0, "a"), (think_end, "\ufffd</think>"), (0, "b")]
    assert simple(parse(pieces, starts_in_reasoning=True)[0]) == ("a\ufffd", "b")


def test_text_goes_out_with_its_token() -> None:
    parser = GlmParser(ParserOptions(TAG_IDS, starts_in_reasoning=True, tools=TOOLS))
    parts = ["hm\n", "ok\n", "</think>", "\nHi", " there ", "<tool_call>", "no"]
    assert [parser.feed(token_id, text) for token_id, text in lex(*parts)] == [
        [Reasoning("hm")],
        [Reasoning("\nok")],
        [],
        [Content("Hi")],
        [Content(" there ")],
        [],
        [],
    ]
    assert parser.feed(0, "t a tool") == [Content("<tool_call>not a tool")]


# --- generated replies ---

TRICKY = st.sampled_from(
    ['"', "\\", "\n", "\t", "👍🏽", "北京", "é", "<", "</arg_value>", "<tool_call>", "</think>",
     "{", "}", "[", "null", "true", "0", "10001", "1e5", "\u2028", "\0", "'", " ", "<arg_key>"]
)  # fmt: skip
TEXTS = st.lists(TRICKY | st.characters(codec="utf-8"), max_size=8).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = st.text(alphabet="abcdefg_", min_size=1, max_size=6)
CALLS = st.lists(st.dictionaries(KEYS, VALUES, max_size=3), max_size=3)
_KINDS: dict[type, str] = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
}
SPLITS = {"replies": 0, "parses": 0}


def reply_of(reasoning: str, content: str, calls: list[dict[str, Any]]) -> list[str]:
    """What the model writes for it; `tools` of `tools_of` are numbered like the calls."""
    parts = [Plain(reasoning), "</think>", Plain(content)]
    for n, arguments in enumerate(calls):
        parts += write_call(f"tool_{n}", arguments)
    return parts


def tools_of(calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        f"tool_{n}": {"properties": {k: {"type": _KINDS[type(v)]} for k, v in arguments.items()}}
        for n, arguments in enumerate(calls)
    }


@settings(max_examples=60)
@example("why\n\n", "\n\nfirst \n", [{"a": 'x\n"</arg_value>', "b": 10001}, {}, {"c": "京👍🏽 "}])
@given(TEXTS, TEXTS, CALLS)
def test_every_cut_gives_the_same_and_arguments_are_read_back(
    reasoning: str, content: str, calls: list[dict[str, Any]]
) -> None:
    tools = tools_of(calls)
    options: dict[str, Any] = {"tools": tools or None, "starts_in_reasoning": True}
    pieces = lex(*reply_of(reasoning, content, calls))
    whole, deltas = parse(pieces, **options)
    assert [call.name for call in whole.tool_calls] == list(tools)
    for call, arguments in zip(whole.tool_calls, calls, strict=True):
        assert json.loads(call.arguments) == arguments
        assert list(json.loads(call.arguments)) == list(arguments)
    assert (whole.reasoning or "") == reasoning.strip("\n")
    expected = content.lstrip("\n")
    assert (whole.content or "") == (expected if expected.strip() or not calls else "")
    assert merge(deltas) == merge(merge(deltas))
    finest = characters(pieces)
    SPLITS["replies"] += 1
    cuts = [finest]
    for place in range(1, len(finest)):  # every single cut
        if finest[place - 1][0] == finest[place][0] == 0:
            cuts.append(_cut(pieces, place))
    cuts += [_groups(finest, width) for width in (2, 3, 5, 8)]
    for cut in cuts:
        SPLITS["parses"] += 1
        assert simple(parse(cut, **options)[0]) == simple(whole)


def _cut(pieces: list[tuple[int, str]], place: int) -> list[tuple[int, str]]:
    """The pieces with one cut after so many characters (a tag counts as one)."""
    cut, at = [], 0
    for token_id, text in pieces:
        size = 1 if token_id else len(text)
        if not token_id and at < place < at + size:
            cut += [(0, text[: place - at]), (0, text[place - at :])]
        else:
            cut.append((token_id, text))
        at += size
    return cut


def _groups(finest: list[tuple[int, str]], width: int) -> list[tuple[int, str]]:
    """Ordinary text in pieces of `width` characters."""
    grouped = []
    for is_text, run in itertools.groupby(finest, lambda piece: piece[0] == 0):
        if is_text:
            text = "".join(c for _, c in run)
            grouped += [(0, text[n : n + width]) for n in range(0, len(text), width)]
        else:
            grouped += run
    return grouped


def test_how_many_cuts_were_tried(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nparser: {SPLITS['replies']} generated replies, {SPLITS['parses']} ways to cut")


NOISE = st.lists(
    st.sampled_from([*TAG_IDS.values(), "noop", "get_weather", "\n", " ", "x", "city", '"', "5"]),
    max_size=30,
)


@settings(max_examples=150)
@given(NOISE, st.booleans(), st.booleans(), st.booleans())
def test_whatever_the_order_of_tags_nothing_breaks_and_no_call_is_half(
    parts: list[str], inside: bool, split: bool, by_itself: bool
) -> None:
    options: dict[str, Any] = {
        "tools": TOOLS,
        "starts_in_reasoning": inside,
        "split_reasoning": split,
        "by_itself": by_itself,
    }
    message, deltas = parse(lex(*parts), **options)
    assert simple(message) == simple(parse(characters(lex(*parts)), **options)[0])
    calls = message.tool_calls if by_itself else message.tool_calls[:-1]
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)
    assert {call.name for call in message.tool_calls} <= TOOLS.keys()
    texts = [d.text for d in deltas if not isinstance(d, CallStart)]
    assert all(texts), "an empty delta"
