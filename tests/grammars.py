"""Grammars for tests below the frontend, written by hand. `fields` are those of `Grammar`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
from glimmer.shared.messages import Grammar

_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def lark_grammar(text: str, **fields: Any) -> Grammar:
    """Any Lark grammar."""
    return Grammar(text, **{"field": "field", **fields})


def schema_grammar(schema: Mapping[str, Any], **fields: Any) -> Grammar:
    """JSON of a schema."""
    text = json.dumps({**schema, "x-guidance": {**_JSON, "coerce_one_of": True}})
    return lark_grammar(f"start: %json {text}", **fields)


def choice_grammar(choices: Sequence[str], **fields: Any) -> Grammar:
    """One of some texts."""
    return lark_grammar("start: " + " | ".join(map(json.dumps, choices)), **fields)


def regex_grammar(pattern: str, **fields: Any) -> Grammar:
    """A text that matches a pattern as a whole."""
    return lark_grammar(f"start: /{llguidance.regex_to_lark(pattern, 'dws')}/", **fields)


def calls_grammar(tool: Mapping[str, Any], tags: Mapping[str, int], **fields: Any) -> Grammar:
    """One call or more of a tool whose arguments are all required: enums, or texts of up to 16
    characters. `tags` are the ids of the model's tags."""
    arguments = ""
    for name, schema in tool["parameters"]["properties"].items():
        values = [
            value if isinstance(value, str) else str(value) for value in schema.get("enum", [])
        ]
        value = " | ".join(map(json.dumps, values)) or "/[^<]{0,16}/"
        arguments += f" <[{tags['<arg_key>']}]> {json.dumps(name)} <[{tags['</arg_key>']}]>"
        arguments += f" <[{tags['<arg_value>']}]> ({value}) <[{tags['</arg_value>']}]>"
    begin, end = f"<[{tags['<tool_call>']}]>", f"<[{tags['</tool_call>']}]>"
    return lark_grammar(f"start: ({begin} {json.dumps(tool['name'])}{arguments} {end})+", **fields)
