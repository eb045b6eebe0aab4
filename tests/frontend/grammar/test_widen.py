"""Schemas lose what no grammar can hold, and nothing else."""

import random
from typing import Any

import pytest
from glimmer.frontend.grammar.ebnf import Rules
from glimmer.frontend.grammar.json_schema import SchemaWriter
from glimmer.frontend.grammar.problems import TooLargeError
from glimmer.frontend.grammar.widen import widen
from grammars import Walk
from schemas import random_schema

OBJECT = {"type": ["object"], "properties": {"a": {"not": {}}}, "required": ["a"]}
WIDER: list[tuple[Any, Any]] = [
    (False, True),
    ("text", True),
    ({"title": "t", "x-mine": 3, "uniqueItems": True}, {}),
    ({"type": "Float"}, {"type": ["number"]}),
    ({"type": ["dict", "none"]}, {"type": ["object", "null"]}),
    ({"type": "any", "minimum": 3}, {"minimum": 3}),
    ({"type": ["string", "any"]}, {}),
    ({**OBJECT, "if": {}, "minProperties": 2}, OBJECT),  # what lies below is for another call
    ({**OBJECT, "required": ["b"], "additionalProperties": False}, {**OBJECT, "required": ["b"]}),
    ({"type": "object", "properties": [], "required": "a"}, {"type": ["object"]}),
    (
        {"patternProperties": {"^x": {"const": 1}}, "additionalProperties": False},
        {"additionalProperties": {"anyOf": [{"const": 1}, False]}},
    ),
    ({"type": "string", "enum": [1, 2]}, {"enum": [1, 2]}),
    ({"type": "array", "enum": ["a"]}, {"type": ["array"]}),
    ({"type": "string", "enum": []}, {"type": ["string"]}),
    ({"enum": [1, 2], "const": 3}, {"const": 3}),
    ({"minimum": 5, "maximum": 3}, {"minimum": 5}),
    ({"minimum": 5, "exclusiveMinimum": True}, {"minimum": 5}),
    ({"minLength": 3, "maxLength": 10**30}, {"minLength": 3}),
    ({"minLength": 3, "maxLength": 500}, {"minLength": 3}),
    ({"pattern": "^a+$", "maxLength": 5}, {"pattern": "^a+$"}),
    ({"pattern": "^(?!a)b$", "maxLength": 5}, {"maxLength": 5}),
    ({"pattern": "^a{1,500}$"}, {}),
    ({"pattern": "a"}, {}),
    ({"pattern": r"^a\$"}, {}),
    ({"type": "array", "items": False, "minItems": 1}, {"type": ["array"], "items": False}),
    ({"anyOf": [], "$ref": 3, "oneOf": {}, "maxItems": 4}, {"maxItems": 4}),
    ({"anyOf": [{}], "not": {}, "maxItems": "4"}, {"anyOf": [{}], "maxItems": "4"}),
]


@pytest.mark.parametrize(("schema", "wider"), WIDER, ids=lambda s: str(s)[:50])
def test_what_is_left(schema: Any, wider: Any) -> None:
    assert widen(schema) == wider


@pytest.mark.parametrize("seed", range(40))
def test_what_a_grammar_holds_stays(seed: int) -> None:
    schema = {k: v for k, v in random_schema(seed).items() if k not in ("$defs", "pattern")}
    wider = widen(schema)
    assert isinstance(wider, dict)
    kinds = schema.get("type", [])
    assert wider.pop("type", []) == ([kinds] if isinstance(kinds, str) else kinds)
    assert wider == {key: value for key, value in schema.items() if key != "type"}


KEYWORDS = [
    *"type enum const properties required additionalProperties items prefixItems pattern".split(),
    *"format minLength maxLength minimum maximum exclusiveMaximum minItems maxItems not".split(),
    *"minProperties maxProperties allOf anyOf oneOf $ref patternProperties nullable".split(),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 3, 10**9, 2.5, "a", "integer", "any", "#/$defs/x", "http://x/y"),
    *([], {}, ["a", 1], [{}], {"a": 1}, ["a", "b"], "^[a-z]+$", r"^\p{L}$", "^(a{99}){99}$"),
]


def nonsense(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(VALUES)
    if rng.random() < 0.3:
        return [nonsense(rng, depth - 1) for _ in range(rng.randrange(3))]
    names = KEYWORDS if rng.random() < 0.8 else ["a", "b", "c"]
    return {name: nonsense(rng, depth - 1) for name in rng.sample(names, rng.randint(1, 3))}


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_nonsense_is_never_refused(first: int, walk: Walk) -> None:
    for seed in range(first, first + 20):
        rng = random.Random(seed)
        properties = {name: nonsense(rng, 4) for name in "abc"}
        document = {"$defs": {"x": nonsense(rng, 3)}, "type": "object", "properties": properties}
        rules = Rules()
        walk(rules.text([SchemaWriter(rules, document, widen).value(document)]), seed)


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(TooLargeError):
        widen({"properties": {f"p{n}": {} for n in range(30_000)}})
