"""From what was asked for to one grammar."""

import json
from typing import Any

import pytest
from glimmer.frontend.grammar.source import FieldError, GrammarSource, OutputFormat, to_ebnf
from grammars import TAG_IDS, Walk

TOOLS = ({"name": "f", "parameters": {}}, {"name": "g", "parameters": {}})
BROKEN = {"name": "h", "parameters": {"type": "object", "required": 1}, "strict": True}
FIELDS = ("tools[0].function.parameters", "tools[1].function.parameters")


def form(kind: Any, source: Any = None) -> OutputFormat:
    return OutputFormat(kind, source, "field")


def texts(source: GrammarSource, walk: Walk, count: int = 60) -> set[str]:
    grammar = to_ebnf(source, TAG_IDS)
    return {out for seed in range(count) if (out := walk(grammar, seed)) is not None}


def test_formats(walk: Walk) -> None:
    for out in texts(GrammarSource(form("json_object")), walk):
        assert isinstance(json.loads(out), dict)
    kinds = {type(json.loads(out)) for out in texts(GrammarSource(form("json")), walk)}
    assert len(kinds) > 3
    assert texts(GrammarSource(form("choice", ["yes", 'n"o'])), walk) == {"yes", 'n"o'}
    assert texts(GrammarSource(form("regex", "a|b{2}")), walk) == {"a", "bb"}
    assert texts(GrammarSource(form("ebnf", 'root ::= "x" | "y"')), walk) == {"x", "y"}
    assert texts(GrammarSource(form("json_schema", {"const": 1})), walk) == {"1"}


def test_calls_that_must_be_made(walk: Walk) -> None:
    one = GrammarSource(None, "must", False, TOOLS, FIELDS)
    assert texts(one, walk) == {"<tool_call>f</tool_call>", "<tool_call>g</tool_call>"}
    many = GrammarSource(None, "must", True, TOOLS, FIELDS)
    counts = {out.count("<tool_call>") for out in texts(many, walk)}
    assert min(counts) == 1
    assert max(counts) > 1


def test_calls_that_may_be_made(walk: Walk) -> None:
    found = texts(GrammarSource(None, "may", False, TOOLS, FIELDS), walk, 200)
    assert all(out.count("<tool_call>") <= 1 for out in found)
    assert all(out.endswith("</tool_call>") for out in found if "<tool_call>" in out)
    assert any("<tool_call>" in out for out in found)
    assert any(out and "<" not in out for out in found)
    either = GrammarSource(form("json_schema", {"const": 1}), "may", False, TOOLS, FIELDS)
    assert texts(either, walk) == {"1", "<tool_call>f</tool_call>", "<tool_call>g</tool_call>"}


@pytest.mark.parametrize(
    ("source", "field", "problem"),
    [
        (GrammarSource(form("json_schema", {"$ref": "#"})), "field", "leads back"),
        (GrammarSource(form("regex", "(")), "field", "not a valid pattern"),
        (
            GrammarSource(None, "must", True, (TOOLS[0], BROKEN), FIELDS),
            FIELDS[1],
            "required a list",
        ),
        (
            GrammarSource(
                form("json_schema", {"properties": {"x": {"$ref": "#"}}, "required": ["x"]})
            ),
            "field",
            "has an end",
        ),
    ],
)
def test_the_wrong_part_is_named(source: GrammarSource, field: str, problem: str) -> None:
    with pytest.raises(FieldError, match=problem) as caught:
        to_ebnf(source, TAG_IDS)
    assert caught.value.field == field
