"""The keywords of JSON Schema: which are known, refused or left out, and how values are read."""

import json
import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Any

from ..parsers.schemas import usual_types

Json = dict[str, Any]
_MAX_COUNT = 1_000_000  # of minLength and the like; no reply is longer
MAX_NUMBER = 10**18
_MAX_DIGITS = 15  # the library computes in doubles
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_FORMATS = frozenset("duration hostname ipv6 uri".split())
COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
HINTS = {  # keywords that tell the type of a schema without one
    "object": "properties required additionalProperties patternProperties minProperties "
    "maxProperties",
    "array": "items prefixItems minItems maxItems",
    "string": "minLength maxLength pattern format",
    "number": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
}
_REFUSED: dict[str, tuple[Any, ...]] = {  # -> values without effect
    **dict.fromkeys("not if then else dependentSchemas dependentRequired".split(), ()),
    **dict.fromkeys("dependencies propertyNames contains minContains maxContains".split(), ()),
    **dict.fromkeys(("$dynamicRef", "$recursiveRef"), ()),
    "uniqueItems": (False,),
    "unevaluatedProperties": (True,),
    "unevaluatedItems": (True,),
}
_SHAPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("properties", "patternProperties"), (dict, "an object")),
    **dict.fromkeys(("required", "enum", "prefixItems"), (list, "a list")),
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), (list, "a list")),
    **dict.fromkeys(("pattern", "format", "$ref"), (str, "a string")),
}
_KNOWN = frozenset((*COMBINING, "enum", "const", *" ".join(HINTS.values()).split()))
KINDS: dict[type, tuple[str, ...]] = {  # of JSON values
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    list: ("array",),
    dict: ("object",),
    type(None): ("null",),
}
_DATE = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_PATTERNS = {  # of formats: narrower than the library's, as all readers take them
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    # Parts no longer than mail allows (RFC 5321 4.5.3.1), or a model that repeats itself never
    # ends.
    "email": r"\w([.+-]?\w){0,31}@[a-z0-9](-?[a-z0-9]){0,30}(\.[a-z]{2,12}){1,4}",
}
_LEFT_OUT = object()


class SchemaError(Exception):
    """The schema is not valid or cannot be enforced; the message says what and where."""

    def __init__(self, problem: str, where: str) -> None:
        shown = where if len(where) <= 200 else f"{where[:100]}...{where[-60:]}"
        super().__init__(f"{shown}: {problem}")


def read_keywords(schema: Json, where: str, is_strict: bool) -> Json:
    """The keywords that matter, as the library reads them. Raises SchemaError for wrong and
    unsupported ones if strict, else leaves them out."""
    keywords: Json = {}
    if schema.get("unevaluatedProperties") is False and schema.keys().isdisjoint(COMBINING):
        schema = {"additionalProperties": False, **schema}
        del schema["unevaluatedProperties"]
    for key, value in schema.items():
        try:
            known = _keyword(key, value, not is_strict)
        except ValueError as error:
            if is_strict:
                raise SchemaError(f"{key} {error}", where) from None
            continue
        if known is not _LEFT_OUT:
            keywords[key] = known
    if isinstance(keywords.get("items"), list):  # before 2020-12
        keywords["prefixItems"] = keywords["items"]
        keywords["items"] = schema.get("additionalItems", True)
    if keywords.get("format") in _PATTERNS:
        pattern = {"pattern": f"^({_PATTERNS[keywords.pop('format')]})$"}
        if "pattern" in keywords:
            keywords["allOf"] = [*keywords.get("allOf", []), pattern]
        else:
            keywords |= pattern
    return keywords


def literals(node: Json) -> list[Any] | None:
    """The values of a schema that has no keywords but enum, const and type."""
    if not node.keys() & {"enum", "const"} or node.keys() - {"enum", "const", "type"}:
        return None
    values = node.get("enum", [node.get("const")])
    if "const" in node:
        values = [value for value in values if dump(value) == dump(node["const"])]
    kinds = set(node.get("type", TYPES))
    return [value for value in values if kinds.intersection(KINDS[type(value)])]


def dump(value: Any) -> str:
    """A JSON value as the grammars spell it."""
    return json.dumps(value, ensure_ascii=False)


def _keyword(key: str, value: Any, lenient: bool) -> Any:
    """The value as the library reads it, or _LEFT_OUT. Raises ValueError saying what is wrong."""
    if key in _REFUSED:
        if not any(value is harmless for harmless in _REFUSED[key]):
            raise ValueError("is not supported")
        return _LEFT_OUT
    if key in _SHAPES and not isinstance(value, _SHAPES[key][0]):
        raise ValueError(f"must be {_SHAPES[key][1]}")
    if key.startswith(("min", "max")) and key.endswith(("Length", "Items", "Properties")):
        return _count(value, key.startswith("min"))
    match key:
        case "type":
            return _types(value, lenient)
        case "required" if not all(isinstance(name, str) for name in value):
            raise ValueError("must hold strings")
        case "minimum" | "exclusiveMinimum":
            return _bound(value, ROUND_CEILING, 1)
        case "maximum" | "exclusiveMaximum":
            return _bound(value, ROUND_FLOOR, -1)
        case "format" if value not in _FORMATS and value not in _PATTERNS:
            return _LEFT_OUT
        case "anyOf" | "oneOf" if lenient and not value:
            return _LEFT_OUT
    return value if key in _KNOWN else _LEFT_OUT


def common_types(a: list[str], b: list[str]) -> list[str]:
    """The types that are in both lists. An integer is a number, too."""
    if "integer" in a + b and "number" in a + b:
        a, b = ([*kinds, "integer"] if "number" in kinds else kinds for kinds in (a, b))
    return [kind for kind in dict.fromkeys(a) if kind in b]


def _types(value: Any, lenient: bool) -> Any:
    names = value if isinstance(value, list) else [value]
    if lenient:
        names = usual_types(value)
        return names if 0 < len(names) < len(TYPES) else _LEFT_OUT
    if not names or not all(name in TYPES for name in names):
        raise ValueError(f"must be among {', '.join(TYPES)}")
    return list(dict.fromkeys(names))


def _count(value: Any, is_least: bool) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("must be an integer of at least 0")
    if is_least and value > _MAX_COUNT:
        raise ValueError(f"must be at most {_MAX_COUNT}")
    return min(value, _MAX_COUNT)


def _bound(value: Any, rounding: str, side: int) -> int | float:
    """A limit of numbers, rounded inwards to what the library reads exactly."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    exact = Context(prec=_MAX_DIGITS, rounding=rounding).plus(Decimal(str(value)))
    if exact * side > MAX_NUMBER:
        raise ValueError(f"must be within {MAX_NUMBER:.0e}")
    clipped = max(min(exact, Decimal(MAX_NUMBER)), Decimal(-MAX_NUMBER))
    return int(clipped) if clipped == clipped.to_integral_value() else float(clipped)


def holds(keywords: Json, value: Any) -> bool:
    """Whether const, limits of numbers and the length of strings allow a value."""
    if "const" in keywords and dump(value) != dump(keywords["const"]):
        return False
    if isinstance(value, str):
        return bool(
            keywords.get("minLength", 0) <= len(value) <= keywords.get("maxLength", math.inf)
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    step = Fraction(str(keywords.get("multipleOf", 0)))
    return bool(
        keywords.get("minimum", value) <= value <= keywords.get("maximum", value)
        and keywords.get("exclusiveMinimum", -math.inf) < value
        and value < keywords.get("exclusiveMaximum", math.inf)
        and not (step and Fraction(str(value)) % step)
    )
