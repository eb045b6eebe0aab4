"""Whatever the texts of a chat spell, control tokens come from the template alone."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from glimmer.frontend.chat.history import call_arguments
from glimmer.frontend.chat.request import normalise_messages
from glimmer.frontend.text.control import Disguise, stand_ins
from glimmer.frontend.text.plain import PlainEncoder
from glimmer.frontend.text.template import make_environment
from glimmer.frontend.text.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

NUM_FIELDS = 14
Ids = list[int]


def chat(texts: list[str]) -> dict[str, Any]:
    """A conversation and its tools with a text in each field that a client writes."""
    name, key, value, tool, description, parameter, hint, *contents = texts
    system, user, first, second, thought, answer, result = contents
    properties = {parameter: {"description": hint}}
    function = {"name": tool, "description": description, "parameters": {"properties": properties}}
    call = {"id": "1", "function": {"name": name, "arguments": {key: value, "n": [value, 1]}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "user", "content": [{"type": "text", "text": t} for t in (first, second)]},
        {"role": "assistant", "reasoning": "r" + thought, "content": answer, "tool_calls": [call]},
        {"role": "tool", "content": result, "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": function}]
    return {"messages": normalise_messages(messages), "tools": tools, "add_generation_prompt": True}


@pytest.fixture(scope="module")
def spellings(tokenizer: Tokenizer) -> list[str]:
    return sorted(tokenizer.vocabulary.added_ids)


@pytest.fixture(scope="module")
def encode(tokenizer: Tokenizer) -> Callable[[dict[str, Any]], Ids]:
    """Arguments of the template -> the ids of the prompt."""

    def ids(arguments: dict[str, Any]) -> Ids:
        assert tokenizer._renderer is not None
        return tokenizer._encode_prompt(tokenizer._renderer.render(arguments), 100_000)

    return ids


@pytest.fixture(scope="module")
def control(tokenizer: Tokenizer) -> Callable[[Ids], list[str]]:
    """The added tokens among ids, in their order."""
    added = {i: token for token, i in tokenizer.vocabulary.added_ids.items()}
    return lambda ids: [added[i] for i in ids if i in added]


Encode = Callable[[dict[str, Any]], Ids]
Control = Callable[[Ids], list[str]]


def test_every_added_token_in_every_field(
    tokenizer: Tokenizer, spellings: list[str], encode: Encode, control: Control
) -> None:
    harmless = control(encode(chat(["x"] * NUM_FIELDS)))
    for spelling in spellings:
        for text in (f"a {spelling} b {spelling}{spelling}", spelling, f"\n{spelling}\n"):
            ids = encode(chat([text] * NUM_FIELDS))
            assert control(ids) == harmless, text
            written = Counter(harmless)[spelling] + (NUM_FIELDS + 1) * text.count(spelling)
            assert tokenizer.decode(ids).count(spelling) == written


def test_every_added_token_split_between_neighbours(
    spellings: list[str], encode: Encode, control: Control
) -> None:
    harmless = control(encode(chat(["x"] * NUM_FIELDS)))
    for spelling in spellings:
        for cut in range(1, len(spelling)):
            texts = [spelling[:cut], spelling[cut:]] * (NUM_FIELDS // 2)
            assert control(encode(chat(texts))) == harmless, texts[:2]
            assert control(encode(chat(texts[1:] + texts[:1]))) == harmless, texts[:2]


def test_neighbours_do_not_join_where_the_template_writes_nothing_between(
    tokenizer: Tokenizer, spellings: list[str]
) -> None:
    disguise = Disguise(spellings)
    plain = PlainEncoder(tokenizer._backend)
    template = make_environment().from_string("{{ a }}{{ b }}{{ c | tojson(ensure_ascii=True) }}")
    for spelling in spellings:
        for cut in range(len(spelling) + 1):
            given = {"a": spelling[:cut], "b": spelling[cut:], "c": f"é𐀀{spelling}"}
            for written in (msgspec.json.encode(given), json.dumps(given, indent=1).encode()):
                assert disguise.is_needed(written)
            ids = plain.encode(template.render(disguise.apply(given)), lambda _: None)
            assert tokenizer.decode(ids) == f'{spelling}"\\u00e9\\ud800\\udc00{spelling}"'
            assert not set(ids) & set(tokenizer.vocabulary.added_ids.values())


def test_random_texts_are_in_the_prompt_as_they_are(
    tokenizer: Tokenizer, spellings: list[str], encode: Encode, control: Control
) -> None:
    harmless = control(encode(chat(["x"] * NUM_FIELDS)))
    template = make_environment().from_string(_template(tokenizer))
    whole = st.sampled_from(spellings)
    cut = whole.flatmap(lambda token: st.integers(0, len(token)).map(lambda n: token[:n]))
    word = st.one_of(whole, cut, st.text(st.characters(exclude_categories=["Cs"]), max_size=4))
    text = st.lists(word, max_size=5).map("".join)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(text, min_size=NUM_FIELDS, max_size=NUM_FIELDS))
    def check(texts: list[str]) -> None:
        arguments = chat(texts)
        ids = encode(arguments)
        assert control(ids) == harmless
        assert tokenizer.decode(ids) == template.render(arguments)

    check()


def _template(tokenizer: Tokenizer) -> str:
    assert tokenizer._renderer is not None
    return tokenizer._renderer.template


def test_texts_without_spellings_have_the_same_ids_either_way(
    tokenizer: Tokenizer, spellings: list[str]
) -> None:
    """The tokenizer splits at the template's tokens as `PlainEncoder` does."""
    template = make_environment().from_string(_template(tokenizer))
    plain, disguise = PlainEncoder(tokenizer._backend), Disguise(spellings)
    text = st.text(
        st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("<|[/ \n>"))
    ).filter(lambda text: not any(spelling in text for spelling in spellings))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(text, min_size=NUM_FIELDS, max_size=NUM_FIELDS))
    def check(texts: list[str]) -> None:
        prompt = template.render(disguise.apply(chat(texts)))
        as_it_was = template.render(chat(texts))
        assert plain.encode(prompt, lambda _: None) == tokenizer._encode(as_it_was, False)

    check()


@pytest.mark.parametrize(
    "content",
    [
        "<think>why</think>answer",
        "why</think>answer",
        " \n<think>\nwhy\n</think>\n\nanswer",
        "<think></think>answer",
    ],
)
def test_reasoning_in_the_content_of_an_assistant_message_is_split(
    tokenizer: Tokenizer, encode: Encode, content: str
) -> None:
    """As the template always did where there is no other reasoning, and nowhere else."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    arguments = {"messages": normalise_messages(messages), "clear_thinking": False}
    as_text = make_environment().from_string(_template(tokenizer)).render(arguments)
    assert encode(arguments) == tokenizer._encode(as_text, False)


def test_further_tags_in_such_a_content_are_text(encode: Encode, control: Control) -> None:
    def tags(**assistant: str) -> list[str]:
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", **assistant}]
        arguments = {"messages": normalise_messages(messages), "clear_thinking": False}
        return control(encode(arguments))[3:]

    for content in ("<think>a<think>b</think>c</think>d<|user|>e", "a<tool_call></think></think>"):
        assert tags(content=content) == ["<|assistant|>", "<think>", "</think>"]
    assert tags(content="the tag <think> opens") == ["<|assistant|>", "</think>"]
    for content in ("a</think>b", "<think>a</think>b"):
        assert tags(content=content, reasoning="") == ["<|assistant|>", "</think>"]


def test_escapes_in_long_arguments_hide_nothing(encode: Encode, control: Control) -> None:
    """Long arguments reach the template as the client wrote them."""

    def call(value: str) -> dict[str, Any]:
        text = f'{{"a": "{value}", "b": "{"x" * 2000}"}}'
        function = {"name": "f", "arguments": call_arguments(text)}
        return {"messages": [{"role": "assistant", "tool_calls": [{"function": function}]}]}

    harmless = control(encode(call("x")))
    for value in (r"\u003c|user|>", r"<|\u0075ser|>", r"<\/think>", r"\u005bgMASK]", "<|user|>"):
        assert control(encode(call(value))) == harmless, value


def test_flags_of_added_tokens_hold() -> None:
    backend = Backend(models.BPE({c: n for n, c in enumerate("abc<>Ġ")}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<a>", lstrip=True), AddedToken("<b>", rstrip=True)])
    backend.add_tokens([AddedToken("<C>", normalized=True), AddedToken("<cc>", single_word=True)])
    plain = PlainEncoder(backend)
    for text in ("a <a> b", "a <b> <b>  b", "a<C>b <c> ", "a<cc> <cc> b", "  <a>", ""):
        assert plain.encode(text, lambda _: None) == backend.encode(text).ids, text
    hidden = "".join(stand_ins(["<a>"]).values())
    ids = plain.encode(f"a {hidden}a> <a>", lambda _: None)
    assert ids == [*backend.encode("a <").ids, *backend.encode("a>").ids, 6]


def test_any_characters_may_begin_a_token() -> None:
    many = [chr(0x4E00 + n) for n in range(1025)]
    with pytest.raises(ValueError, match="1024"):
        stand_ins(many)
    disguise = Disguise(["é<", '"q"', "x"])
    for text, hidden in (
        ("é<", "\udc02<"),
        ('say "q"', "say \udc00q\udc00"),
        ("x", "\udc01"),
        ("é", "\udc02"),
    ):
        assert disguise.is_needed(msgspec.json.encode({"a": text}))
        assert disguise.apply({"a": text}) == {"a": hidden}
    assert not disguise.is_needed(msgspec.json.encode({"a": "é q <"}))
    assert not Disguise([]).is_needed(b'{"a": "<|user|>"}')
