"""Types are read from any schema, however odd, in time."""

from typing import Any

import pytest
from glimmer.frontend.parsers.schemas import Schemas

STRING = {"type": "string"}


def test_arguments_of_branches_and_additional_properties_are_found() -> None:
    branches = {"anyOf": [{"properties": {"a": STRING}}, {"properties": {"b": STRING}}]}
    schemas = Schemas(branches)
    assert schemas.property(branches, "b") == STRING
    assert schemas.property(branches, "c") == {}
    assert schemas.property({"additionalProperties": STRING}, "x") == STRING
    document = {"$ref": "#/$defs/all", "$defs": {"all": branches}}
    assert Schemas(document).property(document, "a") == STRING


def test_types_of_all_branches_are_united() -> None:
    schemas = Schemas({"$defs": {"a/b": {"type": "integer"}}})
    branches = [STRING, {"$ref": "#/$defs/a~1b"}, {"const": None}, {"enum": [1.5, True]}]
    assert schemas.types({"oneOf": branches}) == {"string", "integer", "null", "number", "boolean"}
    assert schemas.types({"properties": {}}) == {"object"}
    assert schemas.types({"items": {}}) == {"array"}
    assert schemas.types({"description": "d"}) == frozenset()


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/properties/k"},
        {"$ref": 5},
        {"$ref": "http://elsewhere/"},
        {"type": 5, "enum": 7, "anyOf": "x", "properties": [], "items": 3},
        {"type": [None, ["string"]], "enum": [[], {}]},
        [],
        "string",
        True,
        None,
    ],
)
def test_no_schema_breaks_it(schema: Any) -> None:
    document = {"properties": {"k": schema}}
    schemas = Schemas(document)
    assert schemas.types(schemas.property(document, "k")) <= {"array", "object"}
    assert schemas.property(schema, "x") == {}


def test_schemas_that_lead_to_themselves_end() -> None:
    loop: dict[str, Any] = {"anyOf": [{"$ref": "#"}] * 500 + [STRING]}
    assert Schemas(loop).types(loop) == {"string"}
    assert Schemas(loop).property(loop, "x") == {}
    nested: Any = STRING
    for _ in range(100):
        nested = {"anyOf": [nested] * 8}
    assert Schemas(nested).types(nested) == {"string"}
    assert Schemas(nested).property(nested, "x") == {}
    for _ in range(5000):
        nested = {"anyOf": [nested]}
    Schemas(nested).types(nested)
    assert Schemas(nested).property(nested, "x") == {}
