"""The text of one tool argument -> JSON of the type that the tool's schema declares.

GLM writes strings without quotes and other arguments as JSON, so `10001` may be a string or a
number. The declared types are tried in the order null, integer, number, boolean, object, array,
string. If no type is declared, or none fits, valid JSON other than a string is taken as JSON and
everything else is text. Never raises on a schema: an invalid one declares nothing.
"""

import ast
import json
import math
import re
import warnings
from typing import Any

from .schemas import Schemas

STRING = frozenset({"string"})
_ORDER = ("null", "integer", "number", "boolean", "object", "array")
_MAX_LITERAL = 1 << 16  # characters; longer ones would take Python's parser too long
_MAX_DEPTH = 16  # of nested values whose types are corrected
_INTEGER = re.compile(r"[+-]?[0-9]{1,4000}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_MISSING = object()


class ValueType:
    """The declared type of one argument. `types` is empty if the schema declares none."""

    def __init__(self, schema: Any, schemas: Schemas) -> None:
        self._schema, self._schemas = schema, schemas
        self.types = schemas.types(schema)

    def to_json(self, text: str) -> str:
        """The whole value as JSON text."""
        try:
            value = self._value(text)
            if isinstance(value, float) and _JSON_NUMBER.fullmatch(text.strip()):
                return text.strip()  # keeps all digits
            return dump(value)
        except RecursionError:  # nested too deeply to be encoded
            return dump(text)

    def _value(self, text: str) -> Any:
        value = _convert(text, self.types)
        if value is not _MISSING:
            value = _fit(value, self._schema, self._schemas, 0)
        elif self.types and "string" not in self.types and (inner := _json_string(text)):
            value = _convert(inner, self.types)  # a number in quotes
        if value is _MISSING:
            value = _untyped(text)
        return value


def argument_type(schemas: Schemas, key: str) -> ValueType:
    """The type of argument `key` of the tool whose parameters are the document."""
    return ValueType(schemas.property(schemas.root, key), schemas)


def dump(value: Any) -> str:
    """JSON in Python's default layout, other scripts unescaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair is valid JSON, but not valid UTF-8
        return json.dumps(value, allow_nan=False)
    return text


def _convert(text: str, types: frozenset[str]) -> Any:
    """The value as the first of the types that it fits, or _MISSING."""
    stripped = text.strip()
    for name in _ORDER:
        if name not in types:
            continue
        value = _as_type(stripped, name)
        if value is not _MISSING:
            return value
    return text if "string" in types else _MISSING


def _as_type(text: str, name: str) -> Any:
    match name:
        case "null":
            return None if text.lower() == "null" else _MISSING
        case "integer":
            return int(text) if _INTEGER.fullmatch(text) else _MISSING
        case "number":
            if _INTEGER.fullmatch(text):
                return int(text)
            return _number(text)
        case "boolean":
            return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), _MISSING)
    kind: type = dict if name == "object" else list
    value = _load(text)
    if value is _MISSING and text[:1] in "{[(":
        value = _python_literal(text)
    return value if isinstance(value, kind) else _MISSING


def _number(text: str) -> Any:
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else _MISSING


def _untyped(text: str) -> Any:
    value = _load(text)
    return text if value is _MISSING or isinstance(value, str) else value


def _json_string(text: str) -> str:
    value = _load(text) if text.lstrip()[:1] == '"' else ""
    return value if isinstance(value, str) else ""


def _load(text: str) -> Any:
    """Strict JSON -> value, or _MISSING."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return _MISSING


def _finite(text: str) -> float:
    """Refuse 1e999 and NaN: Python reads them as numbers, but JSON has none of them."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _python_literal(text: str) -> Any:
    """The value of a Python literal such as {'a': None}, which models also write, or _MISSING."""
    if len(text) > _MAX_LITERAL:
        return _MISSING
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes such as '\\d'
            value = ast.literal_eval(text)
        if isinstance(value, tuple):
            value = list(value)
        return json.loads(json.dumps(value, allow_nan=False))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, SystemError):
        return _MISSING


def _fit(value: Any, schema: Any, schemas: Schemas, depth: int) -> Any:
    """Values inside objects and arrays, converted to the type that the schema declares there: a
    number to a string, or a string to a number."""
    if depth > _MAX_DEPTH:
        return value
    if isinstance(value, dict):
        return {
            k: _fit_leaf(v, schemas.property(schema, k), schemas, depth) for k, v in value.items()
        }
    if isinstance(value, list):
        items = schemas.resolve(schema).get("items")
        return [_fit_leaf(v, items, schemas, depth) for v in value]
    return value


def _fit_leaf(value: Any, schema: Any, schemas: Schemas, depth: int) -> Any:
    types = schemas.types(schema)
    if isinstance(value, dict | list) or value is None or not types:
        return _fit(value, schema, schemas, depth + 1)
    if isinstance(value, str):
        converted = value if "string" in types else _convert(value, types)
        return value if converted is _MISSING else converted
    return dump(value) if types == STRING else value
