"""One JSON schema document: where its references lead, and schemas that are put together of others
(`allOf`, or a `$ref` or `anyOf` with other keywords beside it) as schemas without these."""

from collections.abc import Callable
from itertools import chain
from typing import Any

from .keywords import COMBINING, HINTS, Json, SchemaError, common_types, read_keywords

_MAX_ALTERNATIVES = 256
_NARROWER: dict[str, Callable[..., Any]] = {  # of two limits
    **dict.fromkeys(("minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maxLength", "maxItems", "maxProperties"), min),
    **dict.fromkeys(("minimum", "exclusiveMinimum"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum"), min),
    "type": common_types,
}
_OF_PARTS = ("properties", "patternProperties", "additionalProperties", "prefixItems", "items")


class Document:
    """Schemas of the document `root`. Raises SchemaError. If `lenient`, wrong and unsupported
    parts are left out instead."""

    def __init__(self, root: Any, lenient: bool = False) -> None:
        self.root = root
        self.is_strict = not lenient
        self._found: dict[str, list[Json]] = {}  # alternatives of the targets of references

    def read(self, schema: Any, where: str) -> Json:
        """The keywords that matter, with the type that they are about."""
        if not isinstance(schema, dict):
            self.refuse("must be an object or a boolean", where)
            return {}
        keywords = read_keywords(schema, where, self.is_strict)
        if keywords.keys().isdisjoint(COMBINING):
            _add_type(keywords)
        return keywords

    def alternatives(
        self, schema: Any, where: str = "#", entered: frozenset[str] = frozenset()
    ) -> list[Json]:
        """A value is valid if all keywords of one of these hold. There is no $ref, anyOf or oneOf
        among them, and an allOf has only keywords that are given twice. The schemas within are as
        they were. `entered`: $refs that led here."""
        if isinstance(schema, bool):
            return [{}] if schema else []
        keywords = self.read(schema, where)
        own = {key: value for key, value in keywords.items() if key not in COMBINING}
        parts: list[list[Json]] = []
        position = 0
        for key, value in keywords.items():
            if key == "$ref":
                parts.append(self._behind(value, where, entered))
            elif key == "properties":  # the order in which properties are declared
                position = len(parts)
            elif key in COMBINING:
                at = f"{where}/{key}"
                all_ways = [self.alternatives(p, f"{at}/{n}", entered) for n, p in enumerate(value)]
                parts += all_ways if key == "allOf" else [list(chain(*all_ways))]
        parts.insert(position, [own])
        found: list[Json] = [{}]
        for part in parts:
            if len(found) * len(part) > _MAX_ALTERNATIVES:
                self.refuse(f"more than {_MAX_ALTERNATIVES} combinations of anyOf", where)
            elif part or self.is_strict:
                found = [_both(a, b) for a in found for b in part]
        found = [way for way in found if way.get("type") != []]
        for way in found:
            _add_type(way)
        return found

    def target(self, pointer: str, where: str) -> Any:
        """The schema that a $ref points at. True if there is none and the document is lenient."""
        target = self.root
        if pointer != "#" and not pointer.startswith("#/"):
            self.refuse(f"$ref {pointer!r:.80} must point into the schema", where)
            return True
        for step in pointer.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and step.isdecimal() and int(step[:9]) < len(target):
                target = target[int(step[:9])]
            else:
                target = target.get(step) if isinstance(target, dict) else None
        if isinstance(target, dict | bool):
            return target
        self.refuse(f"$ref {pointer!r:.80} points at no schema", where)
        return True

    def refuse(self, problem: str, where: str) -> None:
        """Raises SchemaError if the document is strict."""
        if self.is_strict:
            raise SchemaError(problem, where)

    def _behind(self, pointer: str, where: str, entered: frozenset[str]) -> list[Json]:
        if pointer in entered:
            self.refuse(f"$ref {pointer!r:.80} leads back to itself", where)
            return [{}]
        if pointer not in self._found:
            target = self.target(pointer, where)
            self._found[pointer] = self.alternatives(target, pointer, entered | {pointer})
        return self._found[pointer]


def all_of(*schemas: Any) -> Any:
    """A schema that is valid where all are."""
    if False in schemas:
        return False
    found: list[Any] = []
    for schema in schemas:
        if schema is not True and schema != {} and schema not in found:
            found.append(schema)
    return found[0] if len(found) == 1 else {"allOf": found} if found else True


def _add_type(keywords: Json) -> None:
    """Name the type that the keywords are about."""
    if keywords.keys().isdisjoint(("type", "enum", "const")):
        kinds = [kind for kind, keys in HINTS.items() if keywords.keys() & set(keys.split())]
        if kinds:
            keywords["type"] = kinds


def _both(first: Json, second: Json) -> Json:
    """The keywords of two schemas put together."""
    if first == second:
        return dict(first)
    both = {**_both_objects(first, second), **_both_arrays(first, second)}
    for key, value in (*first.items(), *second.items()):
        if key in _OF_PARTS:
            continue
        if key not in both:
            both[key] = value
        elif key in ("required", "allOf"):
            both[key] = both[key] + [item for item in value if item not in both[key]]
        elif key in _NARROWER:
            both[key] = _NARROWER[key](both[key], value)
        elif key == "enum":
            both[key] = [item for item in both[key] if item in value]
        elif both[key] != value:
            both["allOf"] = [*both.get("allOf", []), {key: value}]
    return both


def _both_objects(first: Json, second: Json) -> Json:
    """The keywords that hold schemas of properties."""
    found: Json = {}
    pairs = (first, second), (second, first)
    for one, other in pairs:
        for name, schema in one.get("properties", {}).items():
            also = other.get("additionalProperties", True)
            also = other.get("properties", {}).get(name, also)
            found.setdefault("properties", {}).setdefault(name, all_of(schema, also))
        if "additionalProperties" in one:
            also = found.get("additionalProperties", True)
            found["additionalProperties"] = all_of(also, one["additionalProperties"])
        for pattern, schema in one.get("patternProperties", {}).items():
            also = other.get("patternProperties", {}).get(pattern, True)
            found.setdefault("patternProperties", {}).setdefault(pattern, all_of(schema, also))
    if any(_is_entangled(one, other) for one, other in pairs):
        found["allOf"] = [{"patternProperties": {}}]  # to be refused
    return found


def _is_entangled(one: Json, other: Json) -> bool:
    """Whether it depends on the patterns of `one` where additionalProperties hold."""
    if "patternProperties" not in one:
        return False
    names = other.get("properties", {}).keys() - one.get("properties", {}).keys()
    is_limited = [part.get("additionalProperties", True) is not True for part in (one, other)]
    return is_limited[1] or (is_limited[0] and bool(names))


def _both_arrays(first: Json, second: Json) -> Json:
    """The keywords that hold schemas of items."""
    found: Json = {}
    parts = first, second
    count = max(len(part.get("prefixItems", [])) for part in parts)
    if count:
        found["prefixItems"] = [all_of(*(_item(part, n) for part in parts)) for n in range(count)]
    if any("items" in part for part in parts):
        found["items"] = all_of(*(part.get("items", True) for part in parts))
    return found


def _item(keywords: Json, index: int) -> Any:
    first = keywords.get("prefixItems", [])
    return first[index] if index < len(first) else keywords.get("items", True)
