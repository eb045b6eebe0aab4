"""Every spelling of a format, and what excludes what."""

import json
from typing import Any

import pytest
from glimmer.frontend.engine.output_format import output_format
from glimmer.frontend.wire.schema import GenerateParameters, OpenAiBody
from glimmer.shared.errors import RequestError

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    ("fields", "kind", "source", "field"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", None, "response_format"),
        ({"response_format": NAMED}, "json_schema", SCHEMA, "response_format.json_schema.schema"),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA, "guided_json"),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA, "guided_json"),
        ({"guided_json": True}, "json_schema", True, "guided_json"),
        ({"guided_grammar": "json"}, "json", None, "guided_grammar"),
        ({"guided_grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"', "guided_grammar"),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"', "guided_grammar"),
        ({"ebnf": 'root ::= "a"'}, "grammar", 'root ::= "a"', "ebnf"),
        ({"regex": "a+"}, "regex", "a+", "regex"),
        ({"json_schema": json.dumps(SCHEMA)}, "json_schema", SCHEMA, "json_schema"),
        ({"guided_regex": "a+"}, "regex", "a+", "guided_regex"),
        ({"regular_constraint": "a+"}, "regex", "a+", "regular_constraint"),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"], "guided_choice"),
        ({"structured_outputs": {"regex": "a"}}, "regex", "a", "structured_outputs.regex"),
        (
            {
                "structured_outputs": {
                    "choice": ["a"],
                    "disable_any_whitespace": True,
                    "disable_additional_properties": True,
                }
            },
            "choice",
            ["a"],
            "structured_outputs.choice",
        ),
        (
            {"structured_outputs": {"json_object": True, "json": None}},
            "json_object",
            None,
            "structured_outputs.json_object",
        ),
    ],
)
def test_what_is_asked_for(fields: Any, kind: str, source: Any, field: str) -> None:
    found = output_format(OpenAiBody(**fields))
    assert found is not None
    assert (found.kind, found.source, found.field) == (kind, source, field)
    if "response_format" not in fields:
        also = output_format(GenerateParameters(**fields), "parameters.")
        assert also is not None
        assert also.field == f"parameters.{field}"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"guided_json": "", "guided_grammar": "", "regular_constraint": ""},
        {"structured_outputs": {"json": None}},
        {"structured_outputs": {"json_object": False}},
    ],
)
def test_nothing_is_asked_for(fields: Any) -> None:
    assert output_format(OpenAiBody(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": [], "name": "n"},
                }
            },
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": 3, "schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"strict": 3, "schema": {}},
                }
            },
            "response_format.json_schema.strict",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[" * 100_000}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_grammar": 5}, "guided_grammar"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"regex": ["a"]}, "regex"),
        ({"json_schema": "{"}, "json_schema"),
        ({"ebnf": 'start: "a"', "regex": "a"}, "ebnf"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": ["a"] * 10_001}, "guided_choice"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {"magic": 1}}, "structured_outputs.magic"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": {}, "guided_grammar": "json"}, "guided_grammar"),
        ({"guided_json": {}, "response_format": NAMED}, "response_format.json_schema.schema"),
        ({"guided_json": {}, "allowed_token_ids": [1]}, "allowed_token_ids"),
    ],
)
def test_wrong_ones_are_refused(fields: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        output_format(OpenAiBody(**fields))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
