"""The keywords of JSON Schema: which are known, refused or harmless, and how values are read."""

from fractions import Fraction
from typing import Any

from .merge import Json
from .numbers import Limits
from .problems import SourceError

MAX_COUNT = 1024  # of minLength, maxItems and the like
MAX_CHOICES = 10_000  # of an enum or a list of texts; more would take many seconds to compile
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_HINTS = {  # keywords that tell the type of a schema without one
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_REFUSED = frozenset(
    "not if then else dependentSchemas dependentRequired dependencies patternProperties "
    "propertyNames contains minContains maxContains uniqueItems multipleOf additionalItems "
    "unevaluatedProperties unevaluatedItems $dynamicRef $recursiveRef".split()
)
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "multipleOf": (1,),
    "additionalItems": (False, True),
    "unevaluatedProperties": (False, True),
    "unevaluatedItems": (False, True),
}


def types_of(schema: Json, where: str) -> list[str]:
    """The types that a schema names, or that its keywords are about."""
    kinds = schema.get("type")
    if kinds is None:
        hinted = [k for k, keys in _HINTS.items() if any(key in schema for key in keys)]
        return hinted or list(TYPES)
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not all(kind in TYPES for kind in kinds):
        raise SourceError(f"type must be among {', '.join(TYPES)}", where)
    return list(dict.fromkeys(kinds))


def check_keywords(schema: Json, where: str) -> None:
    """Raises SourceError for a keyword that no grammar can hold."""
    for key in schema:
        if key in _REFUSED and schema[key] not in _HARMLESS.get(key, ()):
            raise SourceError(f"{key} is not supported", where)


def is_of_type(value: Any, kind: str) -> bool:
    """Whether a JSON value is of a schema's type."""
    match kind:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
    return isinstance(value, dict)


def counts(schema: Json, what: str, where: str) -> tuple[int, int | None]:
    """min<what> and max<what>. Raises SourceError."""
    least = _count(schema, f"min{what}", where) or 0
    most = _count(schema, f"max{what}", where)
    if most is not None and least > most:
        raise SourceError(f"min{what} exceeds max{what}", where)
    return least, most


def _count(schema: Json, key: str, where: str) -> int | None:
    value = schema.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise SourceError(f"{key} must be an integer", where)
    if not 0 <= value <= MAX_COUNT:
        raise SourceError(f"{key} must be between 0 and {MAX_COUNT}", where)
    return value


def limits(schema: Json, where: str) -> Limits:
    """The least and the most that a number may be. An exclusive limit moves by a tiny step."""
    found: list[Fraction | None] = []
    for side, choose, step in (("inimum", max, 1), ("aximum", min, -1)):
        plain, exclusive = (schema.get(key) for key in (f"m{side}", f"exclusiveM{side}"))
        for value in (plain, exclusive):
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise SourceError(f"m{side} must be a number", where)
        values = [] if plain is None else [Fraction(str(plain))]
        if exclusive is not None:
            values.append(Fraction(str(exclusive)) + step * Fraction(1, 10**30))
        found.append(choose(values) if values else None)
    return found[0], found[1]
