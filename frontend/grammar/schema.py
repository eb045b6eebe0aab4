"""JSON Schema -> schemas that llguidance enforces.

The library holds to a schema, and its error names the keyword that it cannot hold. Schemas are
prepared for it here:

- An object has no other properties than those declared, unless `additionalProperties` says so. Only
  within schemas that are put together (`allOf`, or a `$ref` or `anyOf` with other keywords beside
  it) others are allowed, as the standard has it.
- A schema without a type has the type that its keywords are about.
- Definitions that a part needs come along, so that each part stands alone.
- Annotations, unknown keywords and unknown formats are left out. Limits that the library would read
  differently are adapted or refused.
"""

import json
from collections.abc import Callable
from decimal import Context, Decimal
from typing import Any

from ..parsers.schemas import usual_types

Json = dict[str, Any]
_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
    "json_allowed_escapes": 'nrbtf\\"',  # without \u, which can spell half a character
}
_MAX_COUNT = 1_000_000  # of minLength and the like; no reply is longer
_MAX_NUMBER = 10**18
_MAX_DIGITS = 15  # the library computes in doubles
_MAX_ALTERNATIVES = 256
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_HINTS = {  # keywords that tell the type of a schema without one
    "object": "properties required additionalProperties patternProperties minProperties "
    "maxProperties",
    "array": "items prefixItems minItems maxItems",
    "string": "minLength maxLength pattern format",
    "number": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
}
_KNOWN = frozenset((*_COMBINING, "type", "enum", "const", *" ".join(_HINTS.values()).split()))
_REFUSED: dict[str, tuple[Any, ...]] = {  # -> values without effect
    **dict.fromkeys("not if then else dependentSchemas dependentRequired".split(), ()),
    **dict.fromkeys("dependencies propertyNames contains minContains maxContains".split(), ()),
    **dict.fromkeys(("$dynamicRef", "$recursiveRef"), ()),
    "uniqueItems": (False,),
    "unevaluatedProperties": (False, True),
    "unevaluatedItems": (False, True),
}
_SHAPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("properties", "patternProperties"), (dict, "an object")),
    **dict.fromkeys(("required", "enum", "prefixItems"), (list, "a list")),
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), (list, "a list")),
    **dict.fromkeys(("pattern", "format", "$ref"), (str, "a string")),
}
_KINDS: dict[type, tuple[str, ...]] = {  # of JSON values
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    list: ("array",),
    dict: ("object",),
    type(None): ("null",),
}
_NARROWER: dict[str, Callable[..., Any]] = {  # of two limits
    **dict.fromkeys(("minLength", "minItems", "minProperties", "minimum"), max),
    **dict.fromkeys(("maxLength", "maxItems", "maxProperties", "maximum"), min),
}
_LEFT_OUT = object()


class SchemaError(Exception):
    """The schema is not valid or cannot be enforced; the message says what and where."""

    def __init__(self, problem: str, where: str) -> None:
        shown = where if len(where) <= 200 else f"{where[:100]}...{where[-60:]}"
        super().__init__(f"{shown}: {problem}")


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
        found = [{key: value for key, value in keywords.items() if key not in _COMBINING}]
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
        is_combined = not keywords.keys().isdisjoint(_COMBINING)
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
            if not _has_few_digits(keywords[key]):
                self._refuse(f"{key} has a number with more than {_MAX_DIGITS} digits", where)
                del keywords[key]
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
        keywords: Json = {}
        for key, value in schema.items():
            try:
                known = _keyword(key, value, not self.is_strict)
            except ValueError as error:
                self._refuse(f"{key} {error}", where)
                continue
            if known is not _LEFT_OUT:
                keywords[key] = known
        if isinstance(keywords.get("items"), list):  # before 2020-12
            keywords["prefixItems"] = keywords["items"]
            keywords["items"] = schema.get("additionalItems", True)
        return keywords

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
        elif key in ("type", "enum"):
            both[key] = [item for item in old if item in value]
        elif old != value:
            both["allOf"] = [*both.get("allOf", []), {key: value}]
        else:
            both[key] = value
    return both


def literals(keywords: Json) -> list[Any] | None:
    """The values of a schema that has no keywords but enum, const and type."""
    if not keywords.keys() & {"enum", "const"} or keywords.keys() - {"enum", "const", "type"}:
        return None
    values = keywords.get("enum", [keywords.get("const")])
    if "const" in keywords:
        values = [value for value in values if dump(value) == dump(keywords["const"])]
    kinds = set(keywords.get("type", _TYPES))
    return [value for value in values if kinds.intersection(_KINDS[type(value)])]


def to_text(schema: Json) -> str:
    """As it stands in a Lark grammar."""
    return f"%json {dump(schema)}"


def dump(value: Any) -> str:
    """A JSON value as the grammars spell it."""
    return json.dumps(value, ensure_ascii=False)


def _add_type(keywords: Json) -> None:
    """Name the type that the keywords are about."""
    if keywords.keys().isdisjoint(("type", "enum", "const")):
        kinds = [kind for kind, keys in _HINTS.items() if keywords.keys() & set(keys.split())]
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


# --- keywords ---


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
            return -_most(value, -1)
        case "maximum" | "exclusiveMaximum":
            return _most(value, 1)
        case "format" if value not in _FORMATS:
            return _LEFT_OUT
        case "anyOf" | "oneOf" if lenient and not value:
            return _LEFT_OUT
    return value if key in _KNOWN else _LEFT_OUT


def _types(value: Any, lenient: bool) -> Any:
    names = value if isinstance(value, list) else [value]
    if lenient:
        names = usual_types(value)
        return names if 0 < len(names) < len(_TYPES) else _LEFT_OUT
    if not names or not all(name in _TYPES for name in names):
        raise ValueError(f"must be among {', '.join(_TYPES)}")
    return list(dict.fromkeys(names))


def _count(value: Any, is_least: bool) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("must be an integer of at least 0")
    if is_least and value > _MAX_COUNT:
        raise ValueError(f"must be at most {_MAX_COUNT}")
    return min(value, _MAX_COUNT)


def _most(value: Any, side: int) -> int | float:
    """side * value, at most _MAX_NUMBER."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    if side * value < -_MAX_NUMBER:
        raise ValueError(f"must be within {_MAX_NUMBER:.0e}")
    return min(side * value, _MAX_NUMBER)


def _has_few_digits(value: Any) -> bool:
    """Whether the library does not round a number in it."""
    if isinstance(value, dict | list):
        return all(map(_has_few_digits, value.values() if isinstance(value, dict) else value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return len(Decimal(str(value)).normalize(Context(prec=5000)).as_tuple().digits) <= _MAX_DIGITS
