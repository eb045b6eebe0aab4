"""Keys and values become JSON that grows; every way to cut the text gives the same."""

import json
from typing import Any

import pytest
from glimmer.frontend.parsers.arguments import Arguments
from model_text import Plain, characters, lex

SCHEMA = {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "o": {}}}
OPTIONAL = {"properties": {"s": {"type": ["string", "null"]}}}


def pieces(*parts: str, schema: Any = SCHEMA, close: bool = True, whole: bool = False) -> list[str]:
    arguments = Arguments(schema)
    tokens = lex(*parts) if whole else characters(lex(*parts))
    found = [arguments.tag(t) if i else arguments.text(t) for i, t in tokens]
    return [*found, arguments.close()] if close else found


def text(*parts: str, **options: Any) -> str:
    """The JSON, which is the same cut into characters and in one piece."""
    found = "".join(pieces(*parts, **options))
    assert found == "".join(pieces(*parts, **options, whole=True))
    return found


def pair(key: str, value: str) -> str:
    return f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([""], "{}"),
        (["\n \n"], "{}"),
        ([pair("s", "x")], '{"s": "x"}'),
        ([pair("s", "")], '{"s": ""}'),
        ([pair("s", 'say "hi"\nC:\\x\t')], '{"s": "say \\"hi\\"\\nC:\\\\x\\t"}'),
        ([pair("s", "北京 🎉")], '{"s": "北京 🎉"}'),
        ([pair("n", "5")], '{"n": 5}'),
        ([pair("n", ""), pair("s", "5")], '{"n": "", "s": "5"}'),
        ([pair("o", '{"a":[1,{"b":null}]}')], '{"o": {"a": [1, {"b": null}]}}'),
        (["\n", pair("s", "x"), "\n  \n", pair("n", "5"), "\n"], '{"s": "x", "n": 5}'),
        ([pair(" s ", "x")], '{"s": "x"}'),
        ([pair('ke"y', "x")], '{"ke\\"y": "x"}'),
        ([pair("s", "1"), pair("s", "2")], '{"s": "1", "s": "2"}'),
        # ordinary characters that look like tags
        (["<arg_key>s</arg_key><arg_value>", Plain("</arg_value>"), "</arg_value>"],
         '{"s": "</arg_value>"}'),
        # tags that are text inside a value
        ([pair("s", "a</arg_key>b<arg_value>c<think>d<tool_call>")],
         '{"s": "a</arg_key>b<arg_value>c<think>d<tool_call>"}'),
        ([pair("s", "a<arg_key>b")], '{"s": "a<arg_key>b"}'),
        ([pair("s", "a<arg_key>b</arg_key>c")], '{"s": "a<arg_key>b</arg_key>c"}'),
        ([pair("s", "a<arg_key><arg_key>b</arg_key></arg_key>")],
         '{"s": "a<arg_key><arg_key>b</arg_key></arg_key>"}'),
        # forgotten tags
        (["<arg_key>s</arg_key><arg_value>x", pair("n", "5")], '{"s": "x", "n": 5}'),
        (["<arg_key>s</arg_key><arg_value>x<arg_key>n</arg_key>\n<arg_value>5</arg_value>"],
         '{"s": "x", "n": 5}'),
        (["<arg_key>s<arg_value>x</arg_value>"], '{"s": "x"}'),
        (["<arg_key>s</arg_key>\n x</arg_value>"], '{"s": "x"}'),
        (["<arg_key>s</arg_key><arg_value>x"], '{"s": "x"}'),
        (["<arg_key>s</arg_key><arg_value>x<arg_key>n"], '{"s": "x<arg_key>n"}'),
        (["<arg_key>n</arg_key><arg_value>5"], '{"n": 5}'),
        (["<arg_key>s</arg_key>"], "{}"),
        (["<arg_key>s"], "{}"),
        (["<arg_key>x<arg_key>n</arg_key><arg_value>5</arg_value>"], '{"n": 5}'),
        # stray ones
        (["</arg_value></arg_key><think>noise", pair("n", "5"), "noise"], '{"n": 5}'),
    ],
)  # fmt: skip
def test_json(parts: list[str], expected: str) -> None:
    assert text(*parts) == expected
    json.loads(expected)


def test_the_last_of_equal_keys_counts() -> None:
    assert json.loads(text(pair("s", "1"), pair("s", "2"))) == {"s": "2"}


def test_strings_stream_and_others_wait_until_they_are_whole() -> None:
    found = [p for p in pieces(pair("s", 'a"b'), pair("n", "12")) if p]
    assert found == ['{"s": "', "a", '\\"', "b", '"', ', "n": 12', "}"]


def test_optional_strings_stream_once_they_cannot_be_null() -> None:
    found = [p for p in pieces(pair("s", "nope"), schema=OPTIONAL) if p]
    assert found == ['{"s": "no', "p", "e", '"', "}"]
    assert text(pair("s", " null "), schema=OPTIONAL) == '{"s": null}'
    assert text(pair("s", "nul"), schema=OPTIONAL) == '{"s": "nul"}'
    assert text(pair("s", ""), schema=OPTIONAL) == '{"s": ""}'


def test_what_is_cut_off_stays_open() -> None:
    cut = pair("s", "x") + "<arg_key>n</arg_key><arg_value>1"
    assert text(cut, close=False) == '{"s": "x"'
    assert text("<arg_key>s</arg_key><arg_value>ab", close=False) == '{"s": "ab'
    assert text("<arg_key>s</ar", close=False) == ""


def test_a_value_that_looks_like_text_to_its_end_is_whole() -> None:
    code = "for i in range(3):\n    print(f'{i}')  # <tool_call>\n"
    assert json.loads(text(pair("s", code))) == {"s": code}
