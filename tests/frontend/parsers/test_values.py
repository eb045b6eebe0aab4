"""Argument texts become the JSON that the schema asks for; schemas in the wild do not break it."""

import json
from typing import Any

import pytest
from glimmer.frontend.parsers.schemas import Schemas
from glimmer.frontend.parsers.values import argument_type, dump
from hypothesis import given
from hypothesis import strategies as st


def convert(text: str, schema: Any, **definitions: Any) -> Any:
    """The argument's value: what any strict JSON reader makes of it."""
    parameters = {"type": "object", "properties": {"k": schema}, "$defs": definitions}
    data = argument_type(Schemas(parameters), "k").to_json(text)

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    value = json.loads(data, parse_constant=refuse)
    data.encode()  # no half surrogates
    return value


STRING = {"type": "string"}
NULLABLE = {"anyOf": [{"type": "string"}, {"type": "null"}]}


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("10001", STRING, "10001"),
        ("true", STRING, "true"),
        ("null", STRING, "null"),
        ('"quoted"', STRING, '"quoted"'),
        ("  indented  ", STRING, "  indented  "),
        ("", STRING, ""),
        ("C:\\Users\\test", STRING, "C:\\Users\\test"),
        ("42", {"type": "integer"}, 42),
        (" 42\n", {"type": "integer"}, 42),
        ("-7", {"type": "integer"}, -7),
        ("+7", {"type": "integer"}, 7),
        ("007", {"type": "integer"}, 7),
        ('"42"', {"type": "integer"}, 42),
        ("4.5", {"type": "integer"}, 4.5),
        ("forty", {"type": "integer"}, "forty"),
        ("1_000", {"type": "integer"}, "1_000"),
        ("", {"type": "integer"}, ""),
        ("42", {"type": "number"}, 42),
        ('"42"', {"type": "number"}, 42),
        ("3.14", {"type": "number"}, 3.14),
        ("1e3", {"type": "number"}, 1000.0),
        (".5", {"type": "number"}, 0.5),
        ("5.", {"type": "number"}, 5.0),
        ("NaN", {"type": "number"}, "NaN"),
        ("Infinity", {"type": "number"}, "Infinity"),
        ("1e999", {"type": "number"}, "1e999"),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("1", {"type": "boolean"}, True),
        ("maybe", {"type": "boolean"}, "maybe"),
        ("null", {"type": "null"}, None),
        ("null", NULLABLE, None),
        ("value", NULLABLE, "value"),
        ("null", {"enum": ["value", None], "type": ["string", "null"]}, None),
        ("value", {"enum": ["value", None], "type": ["string", "null"]}, "value"),
        ("null", {"oneOf": [STRING, {"type": "null"}]}, None),
        ("x", {"type": "string", "nullable": True}, "x"),
        ("null", {"type": "string", "nullable": True}, None),
        ("5", {"type": ["string", "integer"]}, 5),
        ("five", {"type": ["string", "integer"]}, "five"),
        ("5", {"enum": ["5", "6"]}, "5"),
        ("5", {"enum": [5, 6]}, 5),
        ("5", {"const": "5"}, "5"),
        ("5", {"allOf": [{"type": "string"}, {"description": "d"}]}, "5"),
        ("5", {"$ref": "#/$defs/zip"}, "5"),
        ("5", {"allOf": [{"$ref": "#/$defs/zip"}]}, "5"),
        ('{"a": [1, {"b": null}]}', {"type": "object"}, {"a": [1, {"b": None}]}),
        ("{'a': None, 'b': True}", {"type": "object"}, {"a": None, "b": True}),
        ("[1, 2,]", {"type": "array"}, [1, 2]),
        ("(1, 2)", {"type": "array"}, [1, 2]),
        ("[1", {"type": "array"}, "[1"),
        ("[NaN]", {"type": "array"}, "[NaN]"),
        ("[1e999]", {"type": "array"}, "[1e999]"),
        ('{"a": 1}', {"properties": {"a": {}}}, {"a": 1}),
        ("[1]", {"items": {}}, [1]),
        ('["\\ud800"]', {"type": "array"}, ["\ud800"]),
        # types as other schema languages call them
        ("5", {"type": "int"}, 5),
        ("5.5", {"type": "float"}, 5.5),
        ("5", {"type": "String"}, "5"),
        ('{"a": 1}', {"type": "dict"}, {"a": 1}),
        ("[1]", {"type": "tuple"}, [1]),
        ("TRUE", {"type": "bool"}, True),
        # nothing declared
        ("123", {}, 123),
        ("1.50", {}, 1.5),
        ("true", {}, True),
        ("null", {}, None),
        ("[1, 2]", {"type": "any"}, [1, 2]),
        ('{"k": 1}', None, {"k": 1}),
        ('"text"', {}, '"text"'),
        ("123abc", {}, "123abc"),
        ("NaN", {}, "NaN"),
        ("", {}, ""),
    ],
)
def test_values(text: str, schema: Any, expected: Any) -> None:
    value = convert(text, schema, zip={"type": "string"})
    assert value == expected
    assert type(value) is type(expected)


def test_numbers_keep_their_digits() -> None:
    parameters = {"properties": {"n": {"type": "number"}}}
    for text in (
        "3.10",
        "1E5",
        "0.1000000000000000055511151231257827",
        "-0.0",
        "12345678901234567",
    ):
        assert argument_type(Schemas(parameters), "n").to_json(text) == text
    big = "9" * 40
    assert argument_type(Schemas({}), "n").to_json(big) == big


def test_values_inside_objects_become_the_type_that_is_declared_there() -> None:
    address = {"type": "object", "properties": {"zip": STRING, "floor": {"type": "integer"}}}
    tags = {"type": "array", "items": STRING}
    person = {"type": "object", "properties": {"home": {"$ref": "#/$defs/address"}, "tags": tags}}
    text = '{"home": {"zip": 10001, "floor": "3", "other": 5}, "tags": [1, "b", true]}'
    expected = {"home": {"zip": "10001", "floor": 3, "other": 5}, "tags": ["1", "b", "true"]}
    assert convert(text, person, address=address) == expected
    assert convert("[1]", {"type": "array", "items": {"$ref": "#/nowhere"}}) == [1]


def test_other_scripts_are_not_escaped() -> None:
    assert dump({"a": "北京 🎉"}) == '{"a": "北京 🎉"}'


def test_bombs_are_text() -> None:
    deep = "[" * 100_000
    for schema in ({"type": "array"}, {"type": "object"}, {}, {"type": "integer"}):
        assert convert(deep, schema) == deep
        assert convert("{" * 500, schema) == "{" * 500
        assert convert("-" * 5000 + "1", schema) == "-" * 5000 + "1"
    digits = "9" * 10_000
    assert convert(digits, {"type": "integer"}) == digits


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(VALUES)
def test_what_the_template_would_write_is_read_back(value: Any) -> None:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer"}
    kind = "null" if value is None else kinds.get(type(value), "number")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    assert convert(text, {"type": kind}) == value
    if not isinstance(value, str):
        assert convert(text, {}) == value


@given(st.text(), st.lists(st.sampled_from(["string", "null", "integer", "object", "x"])))
def test_any_text_is_some_json_under_any_type(text: str, types: list[str]) -> None:
    convert(text, {"type": types})


@pytest.mark.parametrize("piece", ["-", "not ", "1+", "'a' ", "x.", "1 if 1 else ", "lambda:"])
def test_texts_that_strain_pythons_parser_are_text(piece: str) -> None:
    text = f"[{piece * 3000}1]"
    assert convert(text, {"type": "array"}) == text
