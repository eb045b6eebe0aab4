"""From what was asked for to one grammar."""

import json
from typing import Any

import pytest
from glimmer.frontend.grammar.source import FieldError, GrammarSource, OutputFormat
from schemas import Walks

TOOLS = ({"name": "f", "parameters": {}}, {"name": "g", "parameters": {}})
FIELDS = ("tools[0].function.parameters", "tools[1].function.parameters")


def form(kind: Any, source: Any = None) -> OutputFormat:
    return OutputFormat(kind, source, "field")


def texts(source: GrammarSource, walks: Walks, count: int = 60) -> set[str]:
    grammar = walks.text(source)
    return {out for seed in range(count) if (out := walks.walk(grammar, seed)) is not None}


def test_formats(walks: Walks) -> None:
    for out in texts(GrammarSource(form("json_object")), walks):
        assert isinstance(json.loads(out), dict)
    kinds = {type(json.loads(out)) for out in texts(GrammarSource(form("json")), walks)}
    assert len(kinds) > 3
    assert texts(GrammarSource(form("choice", ["yes", 'n"o'])), walks) == {"yes", 'n"o'}
    assert texts(GrammarSource(form("regex", "a|b{2}")), walks) == {"a", "bb"}
    assert texts(GrammarSource(form("json_schema", {"const": 1})), walks) == {"1"}


def test_written_grammars(walks: Walks) -> None:
    ebnf = 'root ::= "x" ws | [a-b] "y"\nws ::= "-"?  # a comment\n'
    assert texts(GrammarSource(form("grammar", ebnf)), walks) == {"x", "x-", "ay", "by"}
    lark = 'start: "x" DIGIT | %json {"const": 1}\nDIGIT: /[0-2]/'
    assert texts(GrammarSource(form("grammar", lark)), walks) == {"x0", "x1", "x2", "1"}
    called = 'start: <tool_call> "a" </tool_call>'
    out = {"<tool_call>a</tool_call>"}
    assert texts(GrammarSource(form("grammar", called)), walks) == out


def test_large_choices(walks: Walks) -> None:
    values = [f"value {n} of many" for n in range(10_000)]
    text = walks.text(GrammarSource(form("choice", values)))
    assert walks.takes(text, "value 9999 of many")
    assert not walks.takes(text, "value 10000 of many")
    text = walks.text(GrammarSource(form("json_schema", {"items": {"enum": values}})))
    assert walks.takes(text, '["value 9999 of many"]')
    long = {"type": "string", "minLength": 50_000, "maxLength": 200_000}
    text = walks.text(GrammarSource(form("json_schema", long)))
    assert not walks.takes(text, '"' + "x" * 49_999 + '"')


def test_calls_that_must_be_made(walks: Walks) -> None:
    one = GrammarSource(None, "must", False, TOOLS, FIELDS)
    assert texts(one, walks) == {"<tool_call>f</tool_call>", "<tool_call>g</tool_call>"}
    many = GrammarSource(None, "must", True, TOOLS, FIELDS)
    counts = {out.count("<tool_call>") for out in texts(many, walks)}
    assert min(counts) == 1
    assert max(counts) > 1


def test_calls_that_may_be_made(walks: Walks) -> None:
    free = walks.text(GrammarSource(None, "may", False, TOOLS, FIELDS))
    call = "<tool_call>f</tool_call>"
    for text in ("", "text\n", call, f"text{call}"):
        assert walks.takes(free, text)
    for text in (call * 2, f"{call}text", "<tool_call>h</tool_call>", "</arg_key>"):
        assert not walks.takes(free, text)
    assert walks.takes(walks.text(GrammarSource(None, "may", True, TOOLS, FIELDS)), f"x{call * 2}")
    either = GrammarSource(form("json_schema", {"const": 1}), "may", False, TOOLS, FIELDS)
    assert texts(either, walks) == {"1", "<tool_call>f</tool_call>", "<tool_call>g</tool_call>"}
    both = walks.text(GrammarSource(form("regex", "a+"), "may", True, TOOLS, FIELDS))
    assert walks.takes(both, call * 2)
    assert not walks.takes(both, f"a{call}")


ENDLESS = {"properties": {"x": {"$ref": "#"}}, "required": ["x"]}
UNSORTED = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
PATTERN = {"properties": {"a": {"type": "array", "items": {"pattern": "(?=a)"}}}}
MANY = 'start: "a"\n' + "".join(f"r{n}: start\n" for n in range(1000))
DEEP = '("a" | ' * 5000 + '"b"' + ")" * 5000


def strict(parameters: Any) -> GrammarSource:
    function = {"name": "h", "strict": True, "parameters": parameters}
    return GrammarSource(None, "must", True, (TOOLS[0], function), FIELDS)


WRONG: list[tuple[GrammarSource, str, str]] = [
    (GrammarSource(form("json_schema", {"$ref": "#"})), "field", "matches nothing"),
    (GrammarSource(form("json_schema", ENDLESS)), "field", "has no end"),
    (GrammarSource(form("regex", "(")), "field", "not a valid pattern"),
    (GrammarSource(form("grammar", "root ::= (((")), "field", "not a valid EBNF grammar"),
    (GrammarSource(form("grammar", 'root ::= ("a"{2}){3}')), "field", "conversion to Lark"),
    (GrammarSource(form("grammar", "root ::= nope")), "field", "nope|conversion"),
    (GrammarSource(form("grammar", 'root ::= root "a" | root')), "field", "matches nothing"),
    (GrammarSource(form("grammar", "start: (((")), "field", "Expected token"),
    (GrammarSource(form("grammar", "start: nope")), "field", "unknown name"),
    (GrammarSource(form("grammar", 'root: "a"')), "field", "no start rule"),
    (GrammarSource(form("grammar", "start: <nope>")), "field", "special token"),
    (GrammarSource(form("grammar", MANY)), "field", "more than 1000 definitions"),
    (GrammarSource(form("grammar", f"start: {DEEP}")), "field", "deep"),
    (GrammarSource(form("grammar", f"root ::= {DEEP}")), "field", "nested too deeply"),
    (GrammarSource(form("json_schema", {"pattern": "(?=a)"}), "may", True, TOOLS, FIELDS),
     "field", "not a valid pattern"),
    (strict(UNSORTED), FIELDS[1], "#/properties/a: uniqueItems"),
    (strict(PATTERN), FIELDS[1], "not a valid pattern"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "field", "problem"), WRONG)
def test_the_wrong_part_is_named(
    source: GrammarSource, field: str, problem: str, walks: Walks
) -> None:
    with pytest.raises(FieldError, match=problem) as caught:
        walks.text(source)
    assert caught.value.field == field
    assert len(str(caught.value)) < 400


def test_one_unusual_tool_is_widened_and_the_others_stay(walks: Walks) -> None:
    exact = {"properties": {"n": {"type": "integer"}}, "required": ["n"]}
    functions = ({"name": "f", "parameters": PATTERN}, {"name": "g", "parameters": exact})
    text = walks.text(GrammarSource(None, "must", True, functions, FIELDS))
    begin, end = "<arg_key>a</arg_key><arg_value>", "</arg_value></tool_call>"
    assert walks.takes(text, f'<tool_call>f{begin}["x"]{end}')
    assert not walks.takes(text, f"<tool_call>f{begin}3{end}")
    begin = begin.replace(">a<", ">n<")
    assert walks.takes(text, f"<tool_call>g{begin}3{end}")
    assert not walks.takes(text, f"<tool_call>g{begin}x{end}")


def test_the_largest_part_is_known() -> None:
    functions = ({"name": "a"}, {"name": "b", "parameters": {"title": "x" * 50}})
    source = GrammarSource(form("choice", ["a"]), "may", True, functions, FIELDS)
    assert source.largest_field == FIELDS[1]
    assert GrammarSource(form("choice", ["x" * 200]), "no").largest_field == "field"
