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
from glimmer.frontend.grammar.document import Document
from glimmer.frontend.grammar.keywords import SchemaError, literals
from glimmer.frontend.grammar.source import FieldError, GrammarSource, OutputFormat
from schemas import Walks, changed, combined_schema, instance, random_schema, read_json

Json = dict[str, Any]
LIMITS = "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()
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
    "leads back to itself": {"allOf": [{"$ref": "#"}, {"type": "null"}]},
    "points at no schema": {"$ref": "#/x"},
    "must point into": {"$ref": "http://example.org/s"},
    "'#/title' points at no schema": {"$ref": "#/title", "title": "x"},
    "^#. matches nothing": {"type": "integer", "minimum": 5, "maximum": 3},
    "minimum must be within": {"type": "integer", "minimum": 10**30},
    "minimum must be a number": {"minimum": "3"},
    "exclusiveMaximum must be a number": {"exclusiveMaximum": True},
    "type must be among": {"type": "texty"},
    "#: type must be among": {"type": []},
    "minItems must be at most 1000000": {"type": "array", "minItems": 10**9},
    "minLength must be an integer": {"minLength": 1.5},
    "maxLength must be an integer": {"maxLength": -1},
    r'\{"a": 1\} beside other keywords': {"const": {"a": 1}, "minProperties": 1},
    "is not a valid pattern": {"type": "string", "pattern": "(?=a)b"},
    "lookarounds not supported": {"type": "string", "pattern": "a\\bb"},
    "pattern must be a string": {"type": "string", "pattern": 3},
    "#: matches nothing": {"enum": []},
    "enum must be a list": {"enum": 3},
    "^#: matches nothing": False,
    "^.: matches nothing": {"type": "array", "items": False, "minItems": 1},
    "properties must be an object": {"properties": []},
    "required must be a list": {"required": "a"},
    "required must hold strings": {"required": [1]},
    "^.. matches nothing": {"required": ["x"], "additionalProperties": False},
    "#: minProperties or maxProperties cannot be held": {"type": "object", "minProperties": 2},
    "#: minProperties or maxProperties cannot be": {
        "properties": {f"p{n}": {} for n in range(65)},
        "maxProperties": 64,
    },
    "patternProperties cannot be put together": {
        "allOf": [
            {"patternProperties": {"^a": {}}, "additionalProperties": False},
            {"properties": {"ab": {}}},
        ]
    },
    r"'\^\[\[a\]\]' beside other properties": {
        "patternProperties": {"^[[a]]": {}},
        "properties": {"a": {}},
    },
    "anyOf must be a list": {"anyOf": {}},
    "must be an object or": [],
    "#/properties/a: must be an object or": {"properties": {"a": 3}},
    "matches nothing$": {"allOf": [{"type": "string"}, {"type": "null"}]},
    "more than 256 combinations": {
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


BOUNDED: list[Json] = [
    {"type": "number"},
    {"type": "integer"},
    {"type": ["number", "null", "boolean"]},
    {"anyOf": [{"type": "integer"}, {"type": "number"}]},
    *({"type": kind, key: 3} for kind in ("integer", "number") for key in LIMITS),
    {"type": ["integer", "boolean"], "minimum": 7},
    {"minimum": 1, "maximum": 1.5},
    {"minimum": 0.5, "exclusiveMaximum": 0.6, "type": "number"},
    {"allOf": [{"minimum": 3}, {"type": ["number", "null"]}, {"multipleOf": 0.5}]},
    {"properties": {"a": {"type": "number"}}, "allOf": [{"required": ["a"]}]},
    {
        "properties": {"a": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}, {"maxProperties": 0}],
    },
    {"type": "object", "properties": {"a": {"type": "number"}}, "minProperties": 1},
    {"type": "array", "items": {"type": "number"}, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "number"}], "items": False},
]
GOING_ON = (b"0", b"9", b".e-1", b",", b'"a', b"\\")  # bytes that a model may prefer
MAX_TEXT = 10_000


def check_end(schema: Any, walks: Walks) -> None:
    text, validator = write(schema, walks), jsonschema_rs.validator_for(schema)
    for favourites in GOING_ON:
        out = walks.longest(text, favourites, MAX_TEXT)
        assert out is not None, f"a model that prefers {favourites!r} never ends {schema}"
        assert validator.is_valid(read_json(out)), f"{out} under {schema}"


@pytest.mark.parametrize("schema", BOUNDED, ids=json.dumps)
def test_numbers_and_objects_have_an_end(schema: Json, walks: Walks) -> None:
    check_end(schema, walks)


@pytest.mark.parametrize("first", range(0, 40, 20))
def test_random_schemas_have_an_end(first: int, walks: Walks) -> None:
    """Also for a model that would rather go on for ever."""
    for seed in range(first, first + 20):
        check_end(random_schema(seed, free_keys=False), walks)
        check_end(combined_schema(seed), walks)


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
     ['{"a": {"x": 1, "y": 2}, "b": null}', '{"a": {}}'],
     ['{"a": 1}', '{"b": 1}', "3", '{"c": 1}', '{"a": {"z": 1}}']),
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
    ({"items": {"enum": [10**30, {"a": 0.1 + 0.2}]}},
     [f"[{10**30}]", '[{"a": 0.30000000000000004}]'], ["[1]", '[{"a": 0.3}]']),
    ({"enum": ["a", "abc", 3, None], "minLength": 2}, ['"abc"', "3", "null"], ['"a"']),
    ({"enum": ["a", "ab", 3], "pattern": "b$"}, ['"ab"', "3"], ['"a"']),
    ({"enum": [2**59, 7, 10, True], "minimum": 8, "exclusiveMaximum": 1e18, "multipleOf": 2},
     [str(2**59), "10", "true"], ["7"]),
    ({"anyOf": [{"enum": ["a"], "maxLength": 0}, {"minLength": 3, "maxLength": 2, "type": "string"},
                {"type": "integer", "minimum": 1.2, "maximum": 1.8}, {"minimum": 2, "maximum": 1},
                {"type": "number", "exclusiveMinimum": 1, "maximum": 1}, {"type": "null"}]},
     ["null"], ['"a"', "1"]),
    ({"allOf": [{"enum": [1, 2]}, {"const": 2}]}, ["2"], ["1"]),
    ({"patternProperties": {"^[^b]$": {"type": "null"}}},
     ['{"a": null}', '{"a": null, "c": null}'], ['{"b": null}', '{"\\"": null}', '{"a": 1}']),
    ({"patternProperties": {"^a": {"type": "null"}, "b$": {"type": "boolean"}},
      "properties": {"axb": True, "ac": {"enum": [None, 3]}}, "additionalProperties": {"const": 1}},
     ['{"ac": null}', '{"a": null, "b": true, "c": 1}'],
     ['{"axb": null}', '{"ab": true}', '{"ac": 3}', '{"a": 1}', '{"c": null}']),
    ({"properties": {name: {"const": 1} for name in "abc"}, "minProperties": 2, "maxProperties": 2},
     ['{"a": 1, "c": 1}', '{"b": 1, "c": 1}'], ["{}", '{"b": 1}', '{"a": 1, "b": 1, "c": 1}']),
    ({"properties": {"a": {"const": 1}}, "additionalProperties": {"const": 2}, "maxProperties": 2},
     ["{}", '{"b": 2, "c": 2}', '{"a": 1, "b": 2}'], ['{"b": 2, "c": 2, "d": 2}', '{"a": 2}']),
    ({"allOf": [{"properties": {"a": {}}, "additionalProperties": False},
                {"properties": {"b": {}}}]}, ['{"a": 1}', "{}"], ['{"a": 1, "b": 1}']),
    ({"allOf": [{"properties": {"a": {"const": 1}}}, {"additionalProperties": True}]},
     ['{"a": 1, "b": 2}'], ['{"a": 2}']),
    ({"allOf": [{"items": {"minimum": 3}, "prefixItems": [{"maximum": 9}]},
                {"items": {"maximum": 5}}]}, ["[5, 4]", "[2]"], ["[6]", "[2, 2]", "[5, 6]"]),
    ({"$ref": "#/$defs/a", "properties": {"b": {}},
      "$defs": {"a": {"properties": {"a": {"$ref": "#/$defs/a"}}}}},
     ['{"a": {"a": {}}, "b": 1}', '{"b": 1}'], ['{"a": {"b": 1}}', '{"c": 1}']),
    ({"type": "number"}, ["-1.67e-27", "6.02E+23", "1e-05", "0.30000000000000004", "0",
                          "1.7e289", "-123456789012345678.5"],
     ["1e290", "01", "1.", ".5", "1e", "1" * 19, "0." + "1" * 21]),
    ({"type": "number", "minimum": 0}, ["1.5", "0.0000000001", str(10**18)],
     ["-1", "0.00000000001", "1" + "0" * 19]),
    ({"type": "number", "minimum": 1e-12, "maximum": 2e-12}, ["0.0000000000015"], ["0", "1"]),
    ({"type": ["integer", "null"]}, ["null", "-12", "9" * 18], ["9" * 19, "1.0", "-01"]),
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


def test_deep_schemas(walks: Walks) -> None:
    schema: Any = {"type": "null"}
    for _ in range(150):
        schema = {"properties": {"a": schema}}
    assert walks.takes(write(schema, walks), '{"a": ' * 150 + "null" + "}" * 150)


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


def test_literals() -> None:
    assert literals({"enum": ["a", 1, True, 1.0], "type": ["integer"]}) == [1]
    assert literals({"enum": [1, 2], "const": 2}) == [2]
    assert literals({"enum": [1, True], "const": True}) == [True]
    assert literals({"enum": [1], "minimum": 3}) is None
    assert literals({"type": ["null"]}) is None


LENIENT: list[tuple[Any, Any]] = [  # a schema, and what is left of it
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
    ({"$ref": 3, "title": "t"}, {}),
]


@pytest.mark.parametrize(("schema", "left"), LENIENT, ids=lambda s: str(s)[:50])
def test_lenient_documents_leave_out_what_is_wrong(schema: Any, left: Any) -> None:
    assert Document({}, lenient=True).read(schema, "#") == left
    if isinstance(schema, dict) and schema.keys() - {"title", "x-mine", "type"}:
        with pytest.raises(SchemaError):
            Document({}).read(schema, "#")


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
