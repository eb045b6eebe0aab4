"""Whatever a grammar allows is valid under its schema; what it cannot hold is refused."""

import json
from typing import Any

import jsonschema_rs
import pytest
from glimmer.frontend.grammar.ebnf import Rules
from glimmer.frontend.grammar.json_schema import SchemaWriter
from glimmer.frontend.grammar.problems import SourceError
from grammars import Walk
from schemas import random_schema

LINKED = {
    "$defs": {
        "n": {
            "type": "object",
            "properties": {
                "v": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]},
            },
            "required": ["v", "next"],
        }
    },
    "$ref": "#/$defs/n",
}
SCHEMAS: list[Any] = [
    True,
    {},
    {"type": "object"},
    {"type": "string"},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": '^[a-z"\\\\\\n]{2,4}$'},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": "boolean"}},
    {"type": "array", "minItems": 3, "items": {"type": "null"}},
    {"type": "array", "maxItems": 0},
    {"type": "array", "prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False},
    {
        "type": "array",
        "prefixItems": [{"type": "null"}],
        "items": {"type": "integer"},
        "maxItems": 3,
    },
    {"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "integer"}},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {}},
        "required": ["b"],
    },
    {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    {"type": "object", "properties": {"a": False, "b": {"type": "null"}}},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "ab": {"type": "null"}},
        "required": ["ab"],
        "additionalProperties": {"type": "boolean"},
    },
    {
        "type": "object",
        "additionalProperties": {"type": "integer"},
        "minProperties": 1,
        "maxProperties": 3,
    },
    {"type": "object", "additionalProperties": False},
    {
        "type": "object",
        "properties": {'a"b': {"type": "null"}, "é": {"const": 1}},
        "additionalProperties": True,
    },
    {"type": "object", "required": ["x"]},
    {"type": "object", "required": ["x"], "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(40)}},
    {"enum": ["a", 1, None, {"x": [1, 2]}, 'q"\n']},
    {"type": "string", "enum": ["a", "b", 3]},
    {"const": {"a": [True]}},
    {"const": 1, "enum": [1, 2]},
    {"type": ["string", "null"], "maxLength": 3},
    {"anyOf": [{"type": "integer"}, {"properties": {"k": {"const": "v"}}, "required": ["k"]}]},
    {
        "type": "object",
        "properties": {"a": {}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    {"oneOf": [{"type": "null"}, {"type": "boolean"}]},
    {
        "allOf": [
            {"properties": {"a": {"minimum": 3}}, "required": ["a"]},
            {"properties": {"a": {"type": "integer", "maximum": 9}}},
        ]
    },
    LINKED,
    {
        "type": "object",
        "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
        "required": ["kids"],
    },
    {
        "$defs": {"a/b~c": {"type": "null"}},
        "properties": {"x": {"$ref": "#/$defs/a~1b~0c", "title": "t"}},
        "required": ["x"],
    },
    {
        "$defs": {"s": {"type": "string"}},
        "properties": {"x": {"$ref": "#/$defs/s", "maxLength": 2}},
        "required": ["x"],
    },
]
REFUSED: dict[str, Any] = {
    "uniqueItems": {"uniqueItems": True},
    "leads back": {"$ref": "#"},
    "leads back to": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    "'#/\\$defs/a' leads": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "points at nothing": {"$ref": "#/x"},
    "must point into": {"$ref": "http://example.org/s"},
    "points at no schema": {"$ref": "#/title", "title": "x"},
    "no integer": {"type": "integer", "minimum": 5, "maximum": 3},
    "type must be": {"type": "texty"},
    "minItems must be between": {"type": "array", "minItems": 10**9},
    "maxLength must be between": {"properties": {"x": {"type": "string", "maxLength": 10**6}}},
    "more than 4096 states": {"type": "string", "pattern": "(a{1000}){1000}"},
    "a pattern and a length": {"type": "string", "pattern": "a", "maxLength": 3},
    "pattern must be": {"type": "string", "pattern": 3},
    "matches nothing": {"enum": []},
    "enum must hold at most 10000": {"enum": list(range(10_001))},
    "#: matches nothing": False,
    "too few items": {"type": "array", "items": False, "minItems": 1},
    "must be an object and": {"properties": []},
    "must hold strings": {"required": [1]},
    "required but not allowed": {"required": ["x"], "additionalProperties": False},
    "undeclared properties only": {"properties": {"a": {}, "b": {}}, "minProperties": 1},
    "keys may be equal": {"type": "object", "minProperties": 2},
    "anyOf must be": {"anyOf": {}},
    "has an end": {
        "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
        "$ref": "#/$defs/n",
    },
    "must be an object or": [],
    "two different pattern": {"allOf": [{"pattern": "a"}, {"pattern": "b"}]},
}


def write(schema: Any) -> str:
    rules = Rules()
    return rules.text([SchemaWriter(rules, schema).value(schema)])


def check(schema: Any, walk: Walk, count: int) -> int:
    """How many of `count` walks ended; all of these are valid."""
    text, validator, ended = write(schema), jsonschema_rs.validator_for(schema), 0
    for seed in range(count):
        out = walk(text, seed)
        if out is not None:
            ended += 1
            assert validator.is_valid(json.loads(out)), f"{out} under {schema}"
            assert "\n" not in out
    return ended


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s)[:60])
def test_what_the_grammar_allows_is_valid(schema: Any, walk: Walk) -> None:
    assert check(schema, walk, 12) > 6


@pytest.mark.parametrize("first", range(0, 100, 10))
def test_random_schemas(first: int, walk: Walk) -> None:
    assert sum(check(random_schema(seed), walk, 3) for seed in range(first, first + 10)) > 20


@pytest.mark.parametrize("problem", REFUSED)
def test_what_it_cannot_hold_is_refused(problem: str) -> None:
    with pytest.raises(SourceError, match=problem):
        write(REFUSED[problem])


def test_depth_is_limited() -> None:
    schema: Any = {"type": "null"}
    for _ in range(300):
        schema = {"properties": {"a": schema}}
    with pytest.raises(SourceError, match="nested deeper"):
        write(schema)


def test_a_tree_of_references_stays_small() -> None:
    twins = {
        f"d{n}": {
            "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}, "b": {"$ref": f"#/$defs/d{n + 1}"}}
        }
        for n in range(40)
    }
    assert len(write({"$defs": {**twins, "d40": {"type": "null"}}, "$ref": "#/$defs/d0"})) < 20_000


def test_strings_hold_no_half_surrogates(walk: Walk) -> None:
    text = write({"type": "string"})
    for seed in range(120):
        json.loads(walk(text, seed) or '""').encode()  # which fails for them
