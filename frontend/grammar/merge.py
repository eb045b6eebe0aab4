"""Two JSON schemas that both must hold -> one (allOf, and keywords beside $ref or anyOf)."""

from collections.abc import Callable
from typing import Any

from ..parsers.schemas import usual_types
from .problems import SourceError

Json = dict[str, Any]
Schema = Json | bool
ANNOTATIONS = frozenset(
    "$schema $id $comment $defs definitions title description default examples example deprecated "
    "readOnly writeOnly discriminator strict nullable contentMediaType contentEncoding".split()
)
_TIGHTER: dict[str, Callable[..., Any]] = {
    "minimum": max,
    "exclusiveMinimum": max,
    "minLength": max,
    "minItems": max,
    "minProperties": max,
    "maximum": min,
    "exclusiveMaximum": min,
    "maxLength": min,
    "maxItems": min,
    "maxProperties": min,
}


def merge(a: Schema, b: Schema, where: str, relaxed: bool = False) -> Schema:
    """A schema that is valid where both are. Raises SourceError for keywords that cannot be
    combined, or takes those of `a` if `relaxed`."""
    if isinstance(a, bool) or isinstance(b, bool):
        if a is False or b is False:
            return False
        return b if isinstance(a, bool) else a
    merged = dict(a)
    for key, value in b.items():
        if key not in merged or key in ANNOTATIONS:
            merged[key] = value
        elif merged[key] != value:
            merged[key] = _both(key, merged[key], value, where, relaxed)
    return merged


def _both(key: str, a: Any, b: Any, where: str, relaxed: bool) -> Any:
    try:
        if key in _TIGHTER:
            return _TIGHTER[key](a, b)
        if key == "required":
            return list(dict.fromkeys([*a, *b]))
        if key == "type":
            return _common_types(*map(usual_types, (a, b))) if relaxed else _common_types(a, b)
        if key == "enum":
            return [value for value in a if value in b]
        if key == "properties":
            common = {n: merge(a[n], b[n], where, relaxed) for n in a.keys() & b.keys()}
            return {**a, **b, **common}
        if key in ("items", "additionalProperties"):
            return merge(a, b, where, relaxed)
    except (TypeError, ValueError, AttributeError):
        if not relaxed:
            raise SourceError(f"{key} has a wrong type", where) from None
    if relaxed:
        return a
    raise SourceError(f"two different {key} cannot be put together", where)


def _common_types(a: Any, b: Any) -> list[str]:
    first = [a] if isinstance(a, str) else list(a)
    second = [b] if isinstance(b, str) else list(b)
    common = [kind for kind in first if kind in second]
    if "integer" not in common and (
        ("integer" in first and "number" in second) or ("number" in first and "integer" in second)
    ):
        common.append("integer")
    return common
