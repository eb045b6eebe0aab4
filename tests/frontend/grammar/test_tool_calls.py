"""Calls in GLM's format: tags in place, required parameters there, values by their schemas."""

import json
import re
from typing import Any

import pytest
from glimmer.frontend.grammar.ebnf import Rules
from glimmer.frontend.grammar.problems import SourceError
from glimmer.frontend.grammar.tool_calls import CallWriter
from grammar_walk import TAG_IDS, Walk

PAIR = re.compile(r"<arg_key>(.*?)</arg_key><arg_value>(.*?)</arg_value>", re.DOTALL)
WEATHER = {
    "type": "object",
    "$defs": {"Unit": {"enum": ["c", "f"]}, "Text": {"type": "string"}},
    "properties": {
        "city": {"type": "string", "description": "where"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"$ref": "#/$defs/Unit"},
        "note": {"anyOf": [{"$ref": "#/$defs/Text"}, {"type": "null"}]},
        "place": {
            "type": "object",
            "properties": {"lat": {"type": "integer"}},
            "required": ["lat"],
        },
        "zip": {"type": "string", "pattern": r"^\d{5}$"},
        "any": {},
    },
    "required": ["city", "unit", "zip"],
}


def write(parameters: Any, name: str = "f") -> str:
    rules = Rules()
    call = CallWriter(rules, TAG_IDS).call({"name": name, "parameters": parameters}, "#")
    return rules.text([call])


def calls(parameters: Any, walk: Walk, count: int = 40) -> list[dict[str, str]]:
    """Arguments of random calls, as texts; each call has been checked as a whole."""
    text, found = write(parameters), []
    for seed in range(count):
        out = walk(text, seed)
        if out is not None:
            body = re.fullmatch(r"<tool_call>f(.*)</tool_call>", out, re.DOTALL)
            assert body, out
            pairs = PAIR.findall(body[1])
            rest = PAIR.sub("", body[1])
            assert rest == "", out
            assert len({key for key, _ in pairs}) == len(pairs), out
            found.append(dict(pairs))
    assert len(found) > count / 2
    return found


def test_parameters_are_typed_ordered_and_there(walk: Walk) -> None:
    found = calls(WEATHER, walk)
    order = list(WEATHER["properties"])
    for arguments in found:
        assert {"city", "unit", "zip"} <= arguments.keys()
        assert list(arguments) == [name for name in order if name in arguments]
        assert arguments["unit"] in ("c", "f")  # an enum's texts without quotes
        assert re.fullmatch(r"[0-9]{5}", arguments["zip"])
        assert 1 <= json.loads(arguments.get("days", "1")) <= 9
        assert isinstance(json.loads(arguments.get("place", '{"lat": 1}'))["lat"], int)
    assert any("days" in a for a in found)
    assert any("days" not in a for a in found)


def test_string_parameters_are_free_text(walk: Walk) -> None:
    texts = {
        a["s"] for a in calls({"properties": {"s": {"type": "string"}}, "required": ["s"]}, walk)
    }
    assert any("\n" in t or '"' in t or "\\" in t or "<" in t for t in texts)


def test_no_parameters_no_arguments(walk: Walk) -> None:
    for parameters in ({}, {"type": "object"}, {"type": "object", "properties": {}}):
        assert walk(write(parameters, "a b"), 1) == "<tool_call>a b</tool_call>"


def test_undeclared_parameters_only_where_all_are(walk: Walk) -> None:
    free = {"type": "object", "additionalProperties": {"type": "boolean"}}
    text = write(free)
    values = [pair for seed in range(30) for pair in PAIR.findall(walk(text, seed) or "")]
    assert values
    assert {value for _, value in values} == {"true", "false"}
    declared = {"properties": {"a": {"type": "null"}}, "additionalProperties": True}
    assert all(a.keys() <= {"a"} for a in calls(declared, walk))


def test_nullable_strings_enums_and_type_lists(walk: Walk) -> None:
    schema = {
        "allOf": [{"$ref": "#/$defs/Base"}],
        "$defs": {"Base": {"properties": {"x": {"type": ["integer", "null"]}}, "required": ["x"]}},
    }
    assert {type(json.loads(a["x"])) for a in calls(schema, walk)} == {int, type(None)}
    schema = {
        "properties": {"x": {"enum": ["a", 1, None]}, "y": {"const": "k"}},
        "required": ["x", "y"],
    }
    found = calls(schema, walk)
    assert {a["x"] for a in found} == {"a", "1", "null"}
    assert {a["y"] for a in found} == {"k"}
    assert calls({"required": ["z"]}, walk)[0].keys() == {"z"}


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"type": "array"}, "type must be object"),
        ({"properties": 3}, "properties must be"),
        ({"required": [3]}, "must hold strings"),
        ({"required": ["x"], "additionalProperties": False}, "required but not allowed"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "#/properties/a: unique"),
        ({"properties": {"a": {"enum": "x"}}}, "enum"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "leads back"),
        ({"$ref": "#"}, "leads back"),
        ({"properties": {"a": {"type": "string", "maxLength": 10**6}}}, "maxLength"),
    ],
)
def test_wrong_parameters_are_refused(parameters: Any, problem: str) -> None:
    with pytest.raises(SourceError, match=problem):
        write(parameters)
