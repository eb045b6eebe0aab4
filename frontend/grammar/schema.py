"""JSON Schema -> schemas that llguidance enforces.

The library holds to a schema, and its error names the keyword that it cannot hold. Schemas are
prepared for it here:

- An object has no other properties than those declared, unless `additionalProperties` says so. Only
  within schemas that are put together (`allOf`, or a `$ref` or `anyOf` with other keywords beside
  it) others are allowed, as the standard has it.
- A schema without a type has the type that its keywords are about.
- Definitions that a part needs come along, so that each part stands alone.
- Annotations and unknown keywords are left out, and values are written as the library reads them
  (`keywords.py`).
"""

import re
from collections.abc import Callable
from typing import Any

from .keywords import (
    COMBINING,
    HINTS,
    MAX_DIGITS,
    MAX_NUMBER,
    Json,
    SchemaError,
    common_types,
    dump,
    has_few_digits,
    read_keywords,
)

_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
    "json_allowed_escapes": 'nrbtf\\"',  # without \u, which can spell half a character
}
# The library lets a quote and a backslash pass as escapes where a class has all control characters
# but not these two, such as [^"]. So a text with a class that may be of this kind (negated, made by
# an operation on sets, or with a NUL) has to match _NO_QUOTES, too.
_NEGATED = re.compile(r"\[:?\^|\\P|&&|--|~~|\\(?:x|u|U)\{?0|\x00")
_NO_QUOTES = {"pattern": r"^[\t\n\r -!#-\[\]-\U0010FFFF]*$"}
_MAX_ALTERNATIVES = 256
_NARROWER: dict[str, Callable[..., Any]] = {  # of two limits
    **dict.fromkeys(("minLength", "minItems", "minProperties", "minimum"), max),
    **dict.fromkeys(("maxLength", "maxItems", "maxProperties", "maximum"), min),
    "type": common_types,
}


class Document:
    """The schemas of the document `root`. Raises SchemaError. If `lenient`, wrong and unsupported
    parts are left out instead."""

    def __init__(self, root: Any, lenient: bool = False) -> None:
        self.root = root
        self.is_strict = not lenient
        self._names: dict[tuple[str, bool], str] = {}  # of definitions, by pointer
        self._pending: list[tuple[str, bool]] = []

    def alone(self, schema: Any, where: str = "#") -> Json:
        """A schema that needs nothing else of the document, for the library."""
        self._names.clear()
        body = self._prepare(schema, where)
        whole = body if isinstance(body, dict) else {} if body else {"enum": []}
        definitions: Json = {}
        while self._pending:
            pointer, is_open = self._pending.pop()
            target = self._prepare(self._target(pointer, where), pointer, is_open)
            definitions[self._names[pointer, is_open]] = target
        if definitions:
            whole["$defs"] = definitions
        return {**whole, "x-guidance": {**_OPTIONS, "lenient": not self.is_strict}}

    def alternatives(
        self, schema: Any, where: str = "#", entered: frozenset[str] = frozenset()
    ) -> list[Json]:
        """A value is valid if all keywords of one of these hold. There is no $ref, anyOf or oneOf
        among them, and an allOf has only keywords that are given twice. The schemas within are as
        they were. `entered`: $refs that led here."""
        if isinstance(schema, bool):
            return [{}] if schema else []
        keywords = self._read(schema, where)
        parts = []
        pointer = keywords.get("$ref", "")
        if pointer in entered:
            self._refuse(f"$ref {pointer!r:.80} leads back to itself", where)
        elif pointer:
            target = self._target(pointer, where)
            parts.append(self.alternatives(target, pointer, entered | {pointer}))
        for n, part in enumerate(keywords.get("allOf", [])):
            parts.append(self.alternatives(part, f"{where}/allOf/{n}", entered))
        for key in ("anyOf", "oneOf"):
            branches: list[Json] = []
            for n, part in enumerate(keywords.get(key, [])):
                branches += self.alternatives(part, f"{where}/{key}/{n}", entered)
            if key in keywords:
                parts.append(branches)
        found = [{key: value for key, value in keywords.items() if key not in COMBINING}]
        for part in parts:
            if len(found) * len(part) > _MAX_ALTERNATIVES:
                self._refuse(f"more than {_MAX_ALTERNATIVES} combinations of anyOf", where)
            elif part or self.is_strict:
                found = [_both(a, b) for a in found for b in part]
        for way in found:
            _add_type(way)
        return found

    def _prepare(self, schema: Any, where: str, is_open: bool = False) -> Any:
        """A schema for the library. `is_open`: it is put together with others."""
        if isinstance(schema, bool):
            return schema
        keywords = self._read(schema, where)
        if keywords.keys() == {"allOf"} and len(keywords["allOf"]) == 1:
            return self._prepare(keywords["allOf"][0], f"{where}/allOf/0", is_open)
        is_combined = not keywords.keys().isdisjoint(COMBINING)
        is_open = is_open or "allOf" in keywords or (is_combined and len(keywords) > 1)
        if "$ref" in keywords:
            keywords["$ref"] = self._reference(keywords["$ref"], is_open)
        for key in ("allOf", "anyOf", "oneOf", "prefixItems"):
            if key in keywords:
                parts = enumerate(keywords[key])
                keywords[key] = [self._prepare(s, f"{where}/{key}/{n}", is_open) for n, s in parts]
        for key in ("properties", "patternProperties"):
            if key in keywords:
                at = f"{where}/{key}"
                pairs = keywords[key].items()
                keywords[key] = {n: self._prepare(s, f"{at}/{n}", is_open) for n, s in pairs}
        for key in ("items", "additionalProperties"):
            if key in keywords:
                keywords[key] = self._prepare(keywords[key], f"{where}/{key}", is_open)
        if not is_combined:
            _add_type(keywords)
            if not is_open:
                _close(keywords)
        self._check_limits(keywords, where)
        return keywords

    def _check_limits(self, keywords: Json, where: str) -> None:
        least = len(keywords.get("required", [])) + 1
        is_closed = keywords.get("additionalProperties") is False
        if keywords.get("minProperties", 0) > least and not is_closed:
            # Other properties may have equal keys, which count as one.
            self._refuse(f"minProperties above {least} is not supported", where)
            keywords["minProperties"] = least
        for key in keywords.keys() & {"enum", "const"}:
            if not has_few_digits(keywords[key]):
                self._refuse(f"{key} has a number with more than {MAX_DIGITS} digits", where)
                del keywords[key]
        if keywords.get("type") == ["integer"]:  # or a model that repeats a digit never ends
            if "exclusiveMinimum" not in keywords:
                keywords.setdefault("minimum", -MAX_NUMBER)
            if "exclusiveMaximum" not in keywords:
                keywords.setdefault("maximum", MAX_NUMBER)
        if _NEGATED.search(keywords.get("pattern", "")):
            keywords["allOf"] = [*keywords.get("allOf", []), _NO_QUOTES]
        if any(map(_NEGATED.search, keywords.get("patternProperties", ()))):
            self._refuse("patternProperties with a negated class is not supported", where)
            del keywords["patternProperties"]
        low = [keywords[key] for key in ("minimum", "exclusiveMinimum") if key in keywords]
        high = [keywords[key] for key in ("maximum", "exclusiveMaximum") if key in keywords]
        if low and high and min(high) - max(low) <= 1:
            # The library lets 2 pass between exclusive 2 and 2.5, not between 2.000001 and 2.5.
            for key, side in (("exclusiveMinimum", 1), ("exclusiveMaximum", -1)):
                if key in keywords:
                    keywords[key] += side * (1e-6 + abs(keywords[key]) * 1e-12)

    def _read(self, schema: Any, where: str) -> Json:
        """The keywords that matter, as the library reads them."""
        if not isinstance(schema, dict):
            self._refuse("must be an object or a boolean", where)
            return {}
        return read_keywords(schema, where, self.is_strict)

    def _reference(self, pointer: str, is_open: bool) -> str:
        key = pointer, is_open
        if key not in self._names:
            self._names[key] = str(len(self._names))
            self._pending.append(key)
        return f"#/$defs/{self._names[key]}"

    def _target(self, pointer: str, where: str) -> Any:
        """The schema that a $ref points at. True if there is none and the document is lenient."""
        target = self.root
        if pointer != "#" and not pointer.startswith("#/"):
            self._refuse(f"$ref {pointer!r:.80} must point into the schema", where)
            return True
        for step in pointer.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and step.isdecimal() and int(step[:9]) < len(target):
                target = target[int(step[:9])]
            else:
                target = target.get(step) if isinstance(target, dict) else None
        if isinstance(target, dict | bool):
            return target
        self._refuse(f"$ref {pointer!r:.80} points at no schema", where)
        return True

    def _refuse(self, problem: str, where: str) -> None:
        if self.is_strict:
            raise SchemaError(problem, where)


def _both(first: Json, second: Json) -> Json:
    """The keywords of two schemas put together."""
    both = dict(first)
    for key, value in second.items():
        old: Any = both.get(key, value)
        if key == "properties":
            both[key] = {**old}
            for name, part in value.items():
                is_other = name in old and old[name] != part
                both[key][name] = {"allOf": [old[name], part]} if is_other else part
        elif key == "required":
            both[key] = list(dict.fromkeys(old + value))
        elif key in _NARROWER:
            both[key] = _NARROWER[key](old, value)
        elif key == "enum":
            both[key] = [item for item in old if item in value]
        elif old != value:
            both["allOf"] = [*both.get("allOf", []), {key: value}]
        else:
            both[key] = value
    return both


def to_text(schema: Json) -> str:
    """As it stands in a Lark grammar."""
    return f"%json {dump(schema)}"


def _add_type(keywords: Json) -> None:
    """Name the type that the keywords are about."""
    if keywords.keys().isdisjoint(("type", "enum", "const")):
        kinds = [kind for kind, keys in HINTS.items() if keywords.keys() & set(keys.split())]
        if kinds:
            keywords["type"] = kinds


def _close(keywords: Json) -> None:
    """Allow no properties but those declared."""
    is_object = keywords.keys() & {"properties", "required", "patternProperties"}
    if is_object and "additionalProperties" not in keywords:
        keywords["additionalProperties"] = False
        if "patternProperties" not in keywords:  # those say what a required property may be
            declared = keywords.get("properties", {})
            missing = [name for name in keywords.get("required", []) if name not in declared]
            keywords["properties"] = declared | dict.fromkeys(missing, True)
