"""Schemas of tools that are not strict, widened until a grammar can hold them.

A tool must not make all others of a request unusable because of one unusual keyword, so what no
grammar can hold is left out, and the rest is enforced. Each call looks at one level, as the writer
comes to it: references lead where they always did. The writer itself is asked what it can hold.
"""

import json
import re
from functools import lru_cache
from typing import Any

from ..parsers.schemas import usual_types
from .ebnf import Rules
from .json_schema import SchemaWriter
from .keywords import TYPES
from .merge import Json, Schema
from .problems import SourceError, TooLargeError
from .strings import dump

# In the order in which they are taken: of two that exclude each other the first one stays.
_KEYWORDS = tuple(
    "const enum type properties required additionalProperties items prefixItems format minimum "
    "maximum exclusiveMinimum exclusiveMaximum".split()
)
# These repeat something, which is slow to compile: 96 characters take 2 s and 10 MB with 154,880
# tokens.
_REPEATING = tuple(
    "pattern minLength maxLength minItems maxItems minProperties maxProperties".split()
)
_MAX_RULES = 96  # that one of them may need
_CHOOSING = ("const", "enum", "type")
_COMBINING = ("allOf", "anyOf", "oneOf")


def widen(schema: Any) -> Schema:
    """A schema that allows what `schema` does and more, with no keywords of its own that
    `SchemaWriter` refuses. Raises TooLargeError."""
    if not isinstance(schema, dict):
        return True
    known = {k: schema[k] for k in (*_KEYWORDS, *_REPEATING) if k in schema}
    kinds = usual_types(known.pop("type", "any"))
    if 0 < len(kinds) < len(TYPES):
        known["type"] = kinds
    if "pattern" in known and not _is_of_whole_text(known["pattern"]):
        del known["pattern"]
    _free_names(schema, known)
    combined = {k: schema[k] for k in _COMBINING if isinstance(schema.get(k), list) and schema[k]}
    if isinstance(schema.get("$ref"), str):
        combined["$ref"] = schema["$ref"]
    if combined:
        return combined | known  # the rest is looked at when the parts have been put together
    return _holdable(known)


def _is_of_whole_text(pattern: Any) -> bool:
    """The writer's patterns match from begin to end, those of schemas anywhere."""
    return isinstance(pattern, str) and re.fullmatch(r"\^.*(?<!\\)\$", pattern) is not None


def _free_names(schema: Json, known: Json) -> None:
    """Properties that are declared by patterns of their names may have any name."""
    patterns = schema.get("patternProperties")
    if isinstance(patterns, dict) and patterns:
        extra = schema.get("additionalProperties", False)
        known["additionalProperties"] = {"anyOf": [*patterns.values(), extra]}


def _holdable(schema: Json) -> Json:
    """Without the keywords that the writer refuses."""
    # A list's enum is often meant for its items; of a number or a text, it says more than the type.
    first = ("type",) if {"array", "object"} & set(schema.get("type", [])) else ()
    kept: Json = {}
    size = 0
    for key in dict.fromkeys((*first, *_KEYWORDS, *_REPEATING)):
        if key not in schema or (key not in _CHOOSING and kept.keys() & {"const", "enum"}):
            continue  # beside values to choose from the writer heeds nothing but the type
        more = kept | {key: schema[key]}
        needed = _num_rules(dump({k: _hollow(k, v) for k, v in more.items()}))
        if needed is not None and (key in _KEYWORDS or needed - size <= _MAX_RULES):
            kept, size = more, needed
    return kept


@lru_cache(1024)
def _num_rules(schema: str) -> int | None:
    """How many rules a schema, given as JSON, needs; None if it is refused."""
    rules = Rules()
    try:
        SchemaWriter(rules, True).value(json.loads(schema))
    except TooLargeError:
        raise
    except SourceError:
        return None
    return len(rules)


def _hollow(key: str, value: Any) -> Any:
    """A keyword's value with nothing but true and false for schemas: those are looked at when
    the writer comes to them."""
    match key:
        case "properties" if isinstance(value, dict):
            return {name: part is not False for name, part in value.items()}
        case "prefixItems" if isinstance(value, list):
            return [True] * len(value)
        case "items" | "additionalProperties":
            return value is not False
    return value
