"""Whatever a grammar allows is valid under its schema; what it cannot hold is refused."""

import datetime
import ipaddress
import json
import random
import uuid
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest
from glimmer.frontend.grammar.keywords import SchemaError, literals
from glimmer.frontend.grammar.schema import Document
from glimmer.frontend.grammar.source import FieldError, GrammarSource, OutputFormat
from schemas import Walks, changed, instance, random_schema, read_json

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
    "#: unevaluatedProperties is not supported": {
        "allOf": [{"properties": {"a": {}}}],
        "unevaluatedProperties": False,
    },
    "unevaluatedItems is not supported": {"prefixItems": [{}], "unevaluatedItems": False},
    "#: uniqueItems is not supported": {"uniqueItems": True},
    "#/properties/a/items: not is not supported": {
        "properties": {"a": {"type": "array", "items": {"not": {}}}}
    },
    "#/\\$defs/a: if is not supported": {"$ref": "#/$defs/a", "$defs": {"a": {"if": {}}}},
    "matches nothing": {"$ref": "#"},
    "matches not": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "too complex, or has no end": {
        "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
        "$ref": "#/$defs/n",
    },
    "circular references": {"allOf": [{"$ref": "#"}, {"type": "null"}]},
    "points at no schema": {"$ref": "#/x"},
    "must point into": {"$ref": "http://example.org/s"},
    "'#/title' points at no schema": {"$ref": "#/title", "title": "x"},
    "minimum \\(5\\) is greater": {"type": "integer", "minimum": 5, "maximum": 3},
    "minimum must be within": {"type": "integer", "minimum": 10**30},
    "minimum must be a number": {"minimum": "3"},
    "exclusiveMaximum must be a number": {"exclusiveMaximum": True},
    "type must be among": {"type": "texty"},
    "#: type must be among": {"type": []},
    "minItems must be at most 1000000": {"type": "array", "minItems": 10**9},
    "minLength must be an integer": {"minLength": 1.5},
    "maxLength must be an integer": {"maxLength": -1},
    "enum has a number with more": {"type": "array", "items": {"enum": [12345678901234567]}},
    "const has a number with more": {"items": {"const": {"a": 123456789.12345678}}},
    "is not a valid pattern": {"type": "string", "pattern": "(?=a)b"},
    "lookarounds not supported": {"type": "string", "pattern": "a\\bb"},
    "pattern must be a string": {"type": "string", "pattern": 3},
    "anyOf is empty": {"enum": []},
    "enum must be a list": {"enum": 3},
    "Unsatisfiable schema": False,
    "required item is unsatisfiable": {"type": "array", "items": False, "minItems": 1},
    "properties must be an object": {"properties": []},
    "required must be a list": {"required": "a"},
    "required must hold strings": {"required": [1]},
    "required property 'x' is unsat": {"required": ["x"], "additionalProperties": False},
    "min/maxProperties only supported": {
        "properties": {"a": {}, "b": {}, "c": {}},
        "minProperties": 2,
    },
    "minProperties above 1 is not supported": {"type": "object", "minProperties": 2},
    "not disjoint": {"patternProperties": {"^a": {}, "b$": {}}},
    "a negated class is not": {"patternProperties": {"^[^a]$": {}}},
    "anyOf must be a list": {"anyOf": {}},
    "must be an object or": [],
    "#/properties/a: must be an object or": {"properties": {"a": 3}},
    "incompatible types\\b": {"allOf": [{"type": "string"}, {"type": "null"}]},
    "schema too large": {
        "allOf": [{"anyOf": [{"required": [f"p{n}{k}"]} for k in range(4)]} for n in range(9)]
    },
}


def write(schema: Any, walks: Walks) -> str:
    return walks.text(GrammarSource(OutputFormat("json_schema", schema, "field")))


def check(schema: Any, walks: Walks, count: int) -> int:
    """How many of `count` walks ended; all of these are valid."""
    text, validator, ended = write(schema, walks), jsonschema_rs.validator_for(schema), 0
    for seed in range(count):
        out = walks.walk(text, seed)
        if out is not None:
            ended += 1
            assert validator.is_valid(read_json(out)), f"{out} under {schema}"
            assert "\n" not in out
    return ended


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s)[:60])
def test_what_the_grammar_allows_is_valid(schema: Any, walks: Walks) -> None:
    assert check(schema, walks, 12) > 3


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_random_schemas(first: int, walks: Walks) -> None:
    for seed in range(first, first + 20):
        check(random_schema(seed), walks, 3)


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_valid_values_are_taken_and_others_are_not(first: int, walks: Walks) -> None:
    """Values that are written as the schema declares them, and values with one change."""
    num_refused = 0
    for seed in range(first, first + 40):
        schema, rng = random_schema(seed), random.Random(seed)
        text, validator = write(schema, walks), jsonschema_rs.validator_for(schema)
        for _ in range(4):
            value = instance(schema, schema, rng)
            assert validator.is_valid(value), (value, schema)
            written = json.dumps(value, ensure_ascii=False)
            assert walks.takes(text, written), f"{written} under {schema}"
            other = changed(value, rng)
            if not validator.is_valid(other):
                num_refused += 1
                written = json.dumps(other, ensure_ascii=False)
                assert not walks.takes(text, written), f"{written} under {schema}"
    assert num_refused > 40


@pytest.mark.parametrize("problem", REFUSED)
def test_what_it_cannot_hold_is_refused(problem: str, walks: Walks) -> None:
    with pytest.raises(FieldError, match=problem) as caught:
        write(REFUSED[problem], walks)
    assert caught.value.field == "field"
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


TAKEN: list[tuple[Any, list[str], list[str]]] = [  # texts that are valid, and that are not
    ({"properties": {"a": {}}}, ['{"a": 1}', "{}"], ["3", '{"b": 1}', '{"a":1}', '{"a": 1} ']),
    ({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}},
     ['{"a": null, "b": null}', '{"b": null}'], ['{"b": null, "a": null}']),
    ({"minLength": 2}, ['"ab"'], ["3", '"a"']),
    ({"type": "string", "pattern": '^[^"]$'}, ['"a"', '"\\n"', '"é"'], ['"\\""']),
    ({"items": {"pattern": r"^[^\\]$"}}, ['["a"]'], [r'["\\"]']),
    ({"pattern": r"^[[:^punct:]]$"}, ['"a"'], [r'"\""', r'"\\"']),
    ({"pattern": r"^[\x00-!#-~]$"}, ['"a"'], [r'"\""']),
    ({"pattern": r"^[\s\S--[\x22]]$"}, ['"a"'], [r'"\""']),
    ({"type": "string", "pattern": "b"}, ['"abc"'], ['"ac"']),
    ({"type": "string", "pattern": "^a", "maxLength": 2}, ['"ab"'], ['"abc"', '"ba"']),
    ({"type": "string", "format": "iri", "uniqueItems": False, "x-mine": 3}, ['"x"'], []),
    ({"type": "array", "minItems": 1.0, "maxItems": 10**40}, ["[1]"], ["[]"]),
    ({"type": "array", "items": [{"type": "null"}], "additionalItems": False},
     ["[null]", "[]"], ["[1]", "[null, 1]"]),
    ({"allOf": [{"properties": {"a": {"properties": {"x": {}}}}},
                {"properties": {"a": {"properties": {"y": {}}}, "b": {"type": "null"}}}]},
     ['{"a": {"x": 1, "y": 2}, "b": null}', '{"c": 1}'], ['{"a": 1}', '{"b": 1}', "3"]),
    ({"allOf": [{"properties": {"a": {}}, "additionalProperties": {"type": "null"}},
                {"properties": {"b": {}}}]}, ['{"a": 1, "b": null}'], ['{"a": 1, "b": 1}']),
    ({"properties": {"a": {"type": "null"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
     ['{"a": null}', '{"b": 1}', '{"a": null, "b": 1}'], ["{}", '{"a": 1}', '{"c": 1}']),
    ({"anyOf": [{"properties": {"a": {}}, "required": ["a"]}, {"type": "null"}]},
     ['{"a": 1}', "null"], ['{"a": 1, "b": 1}', "3"]),
    ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, ["2", "4"], ['"a"']),
    ({"patternProperties": {"^x": {"type": "null"}}}, ['{"x1": null}'], ['{"x1": 1}', '{"y": 1}']),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1},
     ['{"b": 1}'], ["{}"]),
    ({"properties": {"a": {}}, "unevaluatedProperties": False}, ['{"a": 1}'], ['{"b": 1}']),
    ({"type": "integer", "multipleOf": 5, "minimum": 7}, ["10"], ["5", "12"]),
    ({"type": "number", "exclusiveMinimum": 2, "exclusiveMaximum": 2.5}, ["2.2"], ["2", "2.5"]),
    ({"type": "integer", "minimum": -(10**30), "maximum": 10**30}, ["-12", str(10**17)], []),
    ({"type": "integer", "minimum": 123456789012345678},
     ["123456789012346000"], ["123456789012345677"]),
    ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, ["null"], ["1"]),
    ({"const": 2**64}, [str(2**64)], [str(2**64 + 1), "1.8e19"]),
    ({"enum": [10**30, "a", 1]}, [str(10**30), '"a"', "1"], ["a", "10"]),
    ({"enum": ["a", 1, True, None], "type": ["integer", "null"]}, ["1", "null"], ['"a"', "true"]),
    ({"items": {"enum": [10**30]}}, [f"[{10**30}]"], ["[1]"]),
    ({"type": "string"}, ['"é\\n\\""', '"\U0001f600"'], ['"\n"', '"\\ud800"', '"\\u0041"']),
    ({"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "boolean"}},
     ['{"a": null, "b": true}', '{"ab": true}'], ['{"a": true}', '{"\\u0061": true}']),
    ({"$defs": {"a": {"type": "string", "title": "x" * 5000}}, "anyOf": [{"$ref": "#/$defs/a"}]},
     ['"x"'], ["1"]),
]  # fmt: skip


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: json.dumps(case[0])[:60])
def test_texts(case: tuple[Any, list[str], list[str]], walks: Walks) -> None:
    schema, valid, invalid = case
    text = write(schema, walks)
    assert len(text) < 3000, "annotations are left out"
    assert [walks.takes(text, written) for written in valid] == [True] * len(valid)
    assert [walks.takes(text, written) for written in invalid] == [False] * len(invalid)


def test_depth_is_limited(walks: Walks) -> None:
    schema: Any = {"type": "null"}
    for _ in range(300):
        schema = {"properties": {"a": schema}}
    with pytest.raises(FieldError, match="recursion limit"):
        write(schema, walks)


def test_a_tree_of_references_stays_small(walks: Walks) -> None:
    twins = {
        f"d{n}": {
            "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}, "b": {"$ref": f"#/$defs/d{n + 1}"}}
        }
        for n in range(40)
    }
    pairs = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
    for definitions in (twins, pairs):
        schema = {"$defs": {**definitions, "d40": {"type": "null"}}, "$ref": "#/$defs/d0"}
        assert len(write(schema, walks)) < 20_000


def test_only_definitions_that_are_needed_come_along() -> None:
    defs = {"a": {"type": "null"}, "b": {"properties": {"a": {"$ref": "#/$defs/a"}}}, "c": {}}
    document = Document({"$defs": defs})
    assert len(document.alone({"$ref": "#/$defs/b"})["$defs"]) == 2
    assert len(document.alone({"items": {"$ref": "#/$defs/a"}})["$defs"]) == 1
    assert "$defs" not in document.alone({"type": "null"})


def test_literals() -> None:
    assert literals({"enum": ["a", 1, True, 1.0], "type": ["integer"]}) == [1]
    assert literals({"enum": [1, 2], "const": 2}) == [2]
    assert literals({"enum": [1, True], "const": True}) == [True]
    assert literals({"enum": [1], "minimum": 3}) is None
    assert literals({"type": ["null"]}) is None


LENIENT: list[tuple[Any, Any]] = [  # a schema, and what is left of it
    (False, False),
    ("text", {}),
    ({"title": "t", "x-mine": 3, "uniqueItems": True}, {}),
    ({"type": "Float"}, {"type": ["number"]}),
    ({"type": ["dict", "none"]}, {"type": ["object", "null"]}),
    ({"type": "any", "minimum": 3}, {"minimum": 3, "type": ["number"]}),
    ({"type": ["string", "any"]}, {}),
    ({"type": "object", "properties": [], "required": "a"}, {"type": ["object"]}),
    ({"anyOf": [], "$ref": 3, "oneOf": {}, "maxItems": 4}, {"maxItems": 4, "type": ["array"]}),
    ({"minLength": 3, "maxLength": "4"}, {"minLength": 3, "type": ["string"]}),
    ({"exclusiveMinimum": True, "minimum": 5}, {"minimum": 5, "type": ["number"]}),
    ({"$ref": "http://x/y", "title": "t"}, {"$ref": "#/$defs/0"}),
]


@pytest.mark.parametrize(("schema", "left"), LENIENT, ids=lambda s: str(s)[:50])
def test_lenient_documents_leave_out_what_is_wrong(schema: Any, left: Any) -> None:
    part = Document({}, lenient=True).alone({"type": "array", "items": schema})
    assert part["items"] == left
    if isinstance(schema, dict) and schema.keys() - {"title", "x-mine", "type"}:
        with pytest.raises(SchemaError):
            Document({}).alone(schema)


FORMATS: dict[str, Callable[[str], Any]] = {
    "date": datetime.date.fromisoformat,
    "time": lambda text: datetime.time.fromisoformat(text.replace("Z", "+00:00")),
    "date-time": lambda text: datetime.datetime.fromisoformat(text.replace("Z", "+00:00")),
    "uuid": uuid.UUID,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "email": lambda text: text.index("@"),
    "uri": lambda text: text.index(":"),
    "duration": lambda text: text.index("P"),
    "hostname": str,
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_what_their_readers_take(name: str, walks: Walks) -> None:
    text = write({"type": "string", "format": name}, walks)
    found = [out for seed in range(15) if (out := walks.walk(text, seed)) is not None]
    assert found
    for out in found:
        if not (name in ("date", "date-time") and out.startswith('"0000')):  # none in Python
            FORMATS[name](json.loads(out))
    assert not walks.takes(text, '" "')


def test_a_mail_address_is_no_longer_than_mail_allows(walks: Walks) -> None:
    text = write({"type": "string", "format": "email"}, walks)
    assert walks.takes(text, '"first.last+tag_1@mail-2.example.org"')
    assert walks.takes(text, '"' + "z" * 32 + "@" + "y" * 31 + '.org"')
    assert not walks.takes(text, '"' + "z" * 65 + '@example.org"')
    assert not walks.takes(text, '"z@' + "y" * 64 + '.org"')


def test_integers_reach_every_value_of_a_small_range(walks: Walks) -> None:
    text = write({"type": "integer", "minimum": -2, "maximum": 11.5}, walks)
    taken = {n for n in range(-20, 30) if walks.takes(text, str(n))}
    assert taken == set(range(-2, 12))
