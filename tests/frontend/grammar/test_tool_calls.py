"""Calls in GLM's format: tags in place, required parameters there, values by their schemas."""

import json
import re
from typing import Any

import jsonschema_rs
import pytest
from glimmer.frontend.grammar.ebnf import Rules
from glimmer.frontend.grammar.problems import SourceError
from glimmer.frontend.grammar.tool_calls import CallWriter
from glimmer.frontend.parsers.schemas import Schemas
from glimmer.frontend.parsers.values import argument_type
from grammars import TAG_IDS, Walk
from schemas import random_schema

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


def write(parameters: Any, name: str = "f", strict: bool = False) -> str:
    rules = Rules()
    function = {"name": name, "parameters": parameters, "strict": strict}
    return rules.text([CallWriter(rules, TAG_IDS).call(function, "#")])


def calls(
    parameters: Any, walk: Walk, count: int = 40, strict: bool = False
) -> list[dict[str, str]]:
    """Arguments of random calls, as texts; each call has been checked as a whole."""
    text, found = write(parameters, strict=strict), []
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
        ({"patternProperties": {"^x": {}}}, "patternProperties"),
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"properties": {"a": {"type": "float"}}}, "type must be among"),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, "type must be object"),
    ],
)
def test_wrong_parameters_of_strict_functions_are_refused(parameters: Any, problem: str) -> None:
    with pytest.raises(SourceError, match=problem):
        write(parameters, strict=True)


@pytest.mark.parametrize("parameters", [{"type": "array"}, {"$ref": "#"}, {"type": "string"}])
def test_parameters_that_are_no_object_are_always_refused(parameters: Any) -> None:
    with pytest.raises(SourceError, match=r"type must be object|leads back"):
        write(parameters)


UNUSUAL: dict[str, Any] = {  # a parameter's schema, and what all values of it must look like
    "unique items": ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, list),
    "names": ({"type": "object", "propertyNames": {"pattern": "^x"}, "maxProperties": 2}, dict),
    "names by pattern": ({"patternProperties": {"^.*$": {"type": "integer"}}}, dict),
    "multiple of": ({"type": "integer", "multipleOf": 5, "minimum": 1, "maximum": 9}, int),
    "not": ({"type": "boolean", "not": {"const": True}}, bool),
    "if": ({"type": "string", "if": {"minLength": 3}, "then": {"pattern": "^a"}}, str),
    "format": ({"type": "string", "format": "iri-reference"}, str),
    "look-ahead": ({"type": "string", "pattern": "^(?=.*x).+$"}, str),
    "letters": ({"type": "string", "pattern": r"^\p{L}+$", "maxLength": 9}, str),
    "both": ({"type": "string", "pattern": "^[a-z]+$", "maxLength": 9}, str),
    "long": ({"type": "string", "maxLength": 10**30}, str),
    "float": ({"type": "float", "minimum": 0, "exclusiveMinimum": True}, (int, float)),
    "dict": ({"type": "dict", "properties": {"a": {"type": "any"}}, "required": ["a"]}, dict),
    "tuple": ({"type": "tuple", "items": {"type": "int"}, "maxItems": 2}, list),
    "nothing": ({"type": "integer", "minimum": 9, "maximum": 1}, int),
    "tuples of old": ({"type": "array", "items": [{"type": "null"}], "maxItems": 1}, list),
    "elsewhere": ({"type": "object", "properties": {"a": {"$ref": "http://x/y"}}}, dict),
    "all of": ({"allOf": [{"$ref": "#/$defs/mode"}], "default": "on"}, str),
    "two patterns": ({"type": "string", "allOf": [{"pattern": "^a$"}, {"pattern": "^b$"}]}, str),
    "no type": ({"maxLength": 3}, str),
}


def value_of(parameters: Any, arguments: dict[str, str], key: str) -> Any:
    """As the reader of calls understands it."""
    return json.loads(argument_type(Schemas(parameters), key).to_json(arguments[key]))


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_no_grammar_holds_is_left_out_and_the_rest_enforced(case: str, walk: Walk) -> None:
    schema, kind = UNUSUAL[case]
    parameters = {
        "type": "dict",
        "$defs": {"mode": {"type": "string", "enum": ["on", "off"]}},
        "properties": {"x": schema, "mode": {"type": "string", "enum": ["on", "off"]}},
        "required": ["x", "mode"],
        "not": {"required": ["y"]},
    }
    for arguments in calls(parameters, walk, 20):
        assert list(arguments) == ["x", "mode"]
        assert value_of(parameters, arguments, "mode") in ("on", "off")
        value = value_of(parameters, arguments, "x")
        if not schema.keys() & {"maxLength"} or schema.get("type"):
            assert isinstance(value, kind), arguments
        if case == "both":
            assert re.fullmatch("[a-z]+", value)
        if case == "multiple of":
            assert 1 <= value <= 9
        if case == "names by pattern":
            assert all(isinstance(number, int) for number in value.values())
        if case == "all of":
            assert value in ("on", "off")  # without quotes, as the reader expects them


def test_patterns_that_match_anywhere_leave_room(walk: Walk) -> None:
    schema = {"properties": {"x": {"type": "string", "pattern": "^https?://"}}, "required": ["x"]}
    assert any(len(arguments["x"]) > 8 for arguments in calls(schema, walk))


def test_parameters_may_have_branches(walk: Walk) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}},
        "required": ["kind"],
        "anyOf": [
            {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"$ref": "#/$defs/B"},
            {"type": "null"},
        ],
        "$defs": {"B": {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}},
    }
    for strict in (False, True):
        found = {tuple(arguments) for arguments in calls(schema, walk, strict=strict)}
        assert found == {("kind", "a"), ("kind", "b")}


def test_parameters_of_which_nothing_is_known_may_be_anything(walk: Walk) -> None:
    text = write({"$ref": "http://example.org/parameters.json"})
    assert any(PAIR.search(walk(text, seed) or "") for seed in range(30))


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_schemas_are_kept_to_and_understood(first: int, walk: Walk) -> None:
    """Of strict functions, and of others that say what no grammar can hold besides."""
    for seed in range(first, first + 20):
        schema = random_schema(seed, free_keys=False)
        definitions = schema.pop("$defs")
        parameters = {"$defs": definitions, "properties": {"v": schema}, "required": ["v"]}
        validator = jsonschema_rs.validator_for(parameters)
        odd = {**parameters, "properties": {"v": {**schema, "not": {"const": "?"}, "if": {}}}}
        for given, strict in ((parameters, True), (odd, False)):
            if not strict and "'pattern'" in str(parameters):
                continue  # some of those are left out
            text = write(given, strict=strict)
            found = [PAIR.findall(out) for n in range(3) if (out := walk(text, n))]
            for pairs in found:
                value = value_of(given, dict(pairs), "v")
                assert validator.is_valid({"v": value}), f"{pairs} under {schema}"
            assert found
