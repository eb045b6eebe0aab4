"""JSON Schema -> Lark rules for the JSON that is valid under a schema.

The grammar is as strict as the schema or stricter, never laxer, and a reply has an end, also if the
model would rather go on, unless the schema itself allows any length:

- JSON is written in one way: ", " and ": ", no other white space, no escape that is not needed, and
  declared properties in their order.
- An object has no other properties than those declared, unless `additionalProperties` says so. That
  holds for schemas that are put together, too.
- Numbers have a limited number of digits.

Strings are left to the library, which knows patterns and formats, and so are numbers with limits.
"""

import math
import re
from typing import Any

from .document import Document, all_of
from .keywords import (
    COMBINING,
    HINTS,
    KINDS,
    MAX_NUMBER,
    TYPES,
    Json,
    SchemaError,
    dump,
    holds,
    literals,
)
from .lark import NOTHING, Lark, choice, literal, search

_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',  # without \u, which can spell half a character
}
# The library lets a quote and a backslash pass as escapes where a class has all control characters
# but not these two, such as [^"]. So a text with a class that may be of this kind (negated, made by
# an operation on sets, or with a NUL) has to match _NO_QUOTES, too.
_NEGATED = re.compile(r"\[:?\^|\\P|&&|--|~~|\\(?:x|u|U)\{?0|\x00")
_NO_QUOTES = {"pattern": r"^[\t\n\r -!#-\[\]-\U0010FFFF]*$"}
# All digits of a double, and no number beyond the largest double.
_INTEGER = "/-?(0|[1-9][0-9]{0,17})/"
_NUMBER = r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,20})?([eE][+-]?([0-9]{1,2}|1[0-9]{2}|2[0-8][0-9]))?/"
_DECIMALS = 1e-10  # of numbers with limits; the library reads no multipleOf with more
_KEY = r'/"[^"\\\x00-\x1f\x7f]*"/'  # a name that is not declared, beside others that are
_UNFINISHED = ""
_COMMA, _COLON, _EMPTY = '", "', '": "', '""'
_ELSEWHERE_DIFFERENT = re.compile(r"\[\[|&&|--|~~|\|\|")  # in Python, that is
_MAX_COUNTED = 64  # declared properties of an object whose properties are counted
_KEYS = {kind: frozenset(names.split()) for kind, names in HINTS.items()}
_KEYS["integer"] = _KEYS["number"]


class SchemaWriter:
    """Writes schemas of `document` into `lark`. Raises SchemaError. Expressions within are NOTHING
    where no value is valid."""

    def __init__(self, lark: Lark, document: Document) -> None:
        self.lark, self.document = lark, document
        self._written: dict[str, str] = {}  # expressions of schemas that may lead to themselves
        self._nothing_at = ""  # the first place where no value is valid

    def value(self, schema: Any, where: str = "#") -> str:
        """An expression for the values that are valid under a schema. Raises SchemaError if there
        are none."""
        found = self._value(schema, where)
        if found == NOTHING:
            raise SchemaError("matches nothing", self._nothing_at or where)
        return found

    def _value(self, schema: Any, where: str) -> str:
        """The same, or NOTHING."""
        found = self._written_value(schema, where)
        if found == NOTHING and schema is not False:
            self._nothing_at = self._nothing_at or where
        return found

    def _written_value(self, schema: Any, where: str) -> str:
        if isinstance(schema, bool):
            return self._anything() if schema else NOTHING
        keywords = self.document.read(schema, where)
        if keywords.keys().isdisjoint(COMBINING):
            return self.typed(keywords, where)
        key = dump(keywords)
        if key not in self._written:
            self._written[key] = _UNFINISHED
            found = self._combined(keywords, schema, where)
            if (name := self._written[key]) != _UNFINISHED:  # it leads to itself
                self.lark.define(name, found)
            self._written[key] = found
        elif self._written[key] == _UNFINISHED:
            self._written[key] = self.lark.reserve()
        return self._written[key]

    def typed(self, keywords: Json, where: str) -> str:
        """An expression, or NOTHING, for keywords that the document has read, without $ref, anyOf
        and oneOf."""
        if (values := literals(keywords)) is not None:
            texts = [dump(value) for value in values]
            return self.lark.terminal(choice(texts)) if texts else NOTHING
        if not keywords:
            return self._anything()
        if keywords.keys() & {"enum", "const"}:
            return self._filtered(keywords, where)
        return self._any_of(
            [self._of_type(k, keywords, where) for k in keywords.get("type", TYPES)]
        )

    def _combined(self, keywords: Json, schema: Any, where: str) -> str:
        if len(keywords) == 1:
            [(key, value)] = keywords.items()
            if key == "$ref":
                return self._value(self.document.target(value, where), value)
            if key in ("anyOf", "oneOf") or len(value) == 1:
                parts = enumerate(value)
                return self._any_of([self._value(s, f"{where}/{key}/{n}") for n, s in parts])
        ways = self.document.alternatives(schema, where)
        return self._any_of([self.typed(way, where) for way in ways])

    def _any_of(self, found: list[str]) -> str:
        found = [expression for expression in dict.fromkeys(found) if expression != NOTHING]
        return self.lark.any_of(found) if found else NOTHING

    def _sequence(self, *parts: str) -> str:
        found = [part for part in parts if part != _EMPTY]
        if NOTHING in found:
            return NOTHING
        return self.lark.rule(" ".join(found)) if len(found) > 1 else "".join(found) or _EMPTY

    def _anything(self) -> str:
        key = "anything"
        if key not in self.lark.shared:
            name = self.lark.shared[key] = self.lark.reserve()
            kinds = [self._of_type(kind, {}, "#") for kind in TYPES if kind != "integer"]
            self.lark.define(name, " | ".join(kinds))
        return self.lark.shared[key]

    def _filtered(self, keywords: Json, where: str) -> str:
        """Given values, as far as the other keywords allow them."""
        parts = [keywords, *keywords.get("allOf", [])]
        values = literals({k: v for k, v in keywords.items() if k in ("enum", "const", "type")})
        found, strings = [], []
        for value in values or []:
            kind = KINDS[type(value)][-1]
            if not all(holds(part, value) for part in parts):
                continue
            if kind == "string" and any("pattern" in part for part in parts):
                strings.append(value)  # the library knows patterns
                continue
            if kind in ("array", "object") and any(part.keys() & _KEYS[kind] for part in parts):
                self.document.refuse(f"{dump(value):.80} beside other keywords", where)
            found.append(dump(value))
        texts = self.lark.terminal(choice(found)) if found else NOTHING
        checked = self._leaf("string", {**keywords, "enum": strings}) if strings else NOTHING
        return self._any_of([texts, checked])

    def _of_type(self, kind: str, keywords: Json, where: str) -> str:
        match kind:
            case "null":
                return '"null"'
            case "boolean":
                return self.lark.terminal('"true" | "false"')
            case "object":
                return self._object(keywords, where)
            case "array":
                return self._array(keywords, where)
            case "string":
                least, most = keywords.get("minLength", 0), keywords.get("maxLength", MAX_NUMBER)
                return self._leaf(kind, keywords) if least <= most else NOTHING
        if any(part.keys() & _KEYS[kind] for part in (keywords, *keywords.get("allOf", []))):
            limited = _with_an_end(kind, keywords)
            return self._leaf(kind, limited) if limited else NOTHING
        return self.lark.terminal(_INTEGER if kind == "integer" else _NUMBER)

    def _leaf(self, kind: str, keywords: Json) -> str:
        """Strings and numbers as the library writes them."""
        keys = _KEYS[kind] | {"enum"}
        parts = []
        for part in (keywords, *keywords.get("allOf", [])):
            parts.append({key: value for key, value in part.items() if key in keys})
        if any(_NEGATED.search(part.get("pattern", "")) for part in parts):
            parts.append(_NO_QUOTES)
        schema = {"type": kind, **parts[0]}
        if also := [part for part in parts[1:] if part]:
            schema["allOf"] = also
        options = {**_OPTIONS, "lenient": not self.document.is_strict}
        return self.lark.rule(f"%json {dump({**schema, 'x-guidance': options})}")

    def _array(self, keywords: Json, where: str) -> str:
        first = []
        for n, schema in enumerate(keywords.get("prefixItems", [])):
            first.append(self._value(schema, f"{where}/prefixItems/{n}"))
        least, most = keywords.get("minItems", 0), keywords.get("maxItems")
        other = NOTHING
        if most is None or most > len(first):
            other = self._value(keywords.get("items", True), f"{where}/items")
        count = [*first, NOTHING].index(NOTHING)
        if count < len(first) or other == NOTHING:
            most = count if most is None else min(most, count)
        rest = self._repeat(other, least - count, None if most is None else most - count, not count)
        for n in reversed(range(count if most is None else min(count, most))):
            step = self._sequence(_COMMA if n else _EMPTY, first[n], rest)
            rest = self._any_of([step, NOTHING if n < least else _EMPTY])
        return self._sequence('"["', rest, '"]"')

    def _repeat(self, item: str, least: int, most: int | None, is_first: bool) -> str:
        """So many items, each after a comma if it is not the first."""
        least = max(0, least)
        if item == NOTHING or (most is not None and most <= 0):
            return NOTHING if least else _EMPTY
        if is_first:
            others = self._repeat(item, least - 1, None if most is None else most - 1, False)
            some = self._sequence(item, others)
            return self._any_of([some, NOTHING if least else _EMPTY])
        limits = f"{{{least},{'' if most is None else most}}}"
        return self.lark.rule(f"({_COMMA} {item}){limits}")

    def _object(self, keywords: Json, where: str) -> str:
        if any("patternProperties" in part for part in keywords.get("allOf", [])):
            self.document.refuse("patternProperties cannot be put together here", where)
        declared, required = keywords.get("properties", {}), keywords.get("required", [])
        patterns = keywords.get("patternProperties", {})
        is_free = keywords.keys().isdisjoint(("properties", "required", "patternProperties"))
        extra = keywords.get("additionalProperties", is_free)
        unknown = keywords.get("additionalProperties", not patterns)
        names = [*dict.fromkeys((*declared, *required))]
        pairs = []
        for name in names:
            schemas = [patterns[p] for p in patterns if self._matches(p, name, where)]
            if name in declared or not schemas:
                schemas.append(declared.get(name, unknown))
            value = self._value(all_of(*schemas), f"{where}/properties/{name}")
            pair = self._sequence(literal(dump(name)), _COLON, value)
            if pair != NOTHING or name in required:
                pairs.append((pair, name in required))
        other = self._other_pair(names, patterns, extra, where)
        least, most = keywords.get("minProperties", 0), keywords.get("maxProperties")
        rest = self._pairs(pairs, other, least, most)
        if rest == NOTHING and (free := self._pairs(pairs, other, 0, None)) != NOTHING:
            self.document.refuse("minProperties or maxProperties cannot be held here", where)
            rest = free
        return self._sequence('"{"', rest, '"}"')

    def _other_pair(self, names: list[str], patterns: Json, extra: Any, where: str) -> str:
        """A property that is not declared."""
        if not names and not patterns:
            value = self._value(extra, f"{where}/additionalProperties")
            return self._sequence(self._leaf("string", {}), _COLON, value)
        taken = [self.lark.terminal(choice([*map(dump, names)]))] if names else []
        keys = {p: self.lark.terminal(f'"\\"" {search(p)} "\\""') for p in patterns}
        found = []
        for matched in (*patterns, None):  # a name that matches two of them is not written
            schema = extra if matched is None else patterns[matched]
            if schema is False:
                continue
            excluded = [*taken, *(keys[p] for p in patterns if p != matched)]
            body = [
                _KEY,
                *([keys[matched]] if matched in keys else []),
                *(f"~{key}" for key in excluded),
            ]
            value = self._value(schema, f"{where}/patternProperties")
            found.append(self._sequence(self.lark.terminal(" & ".join(body)), _COLON, value))
        return self._any_of(found)

    def _matches(self, pattern: str, name: str, where: str) -> bool:
        """Whether a declared property is one of the pattern, too."""
        try:
            if not _ELSEWHERE_DIFFERENT.search(pattern):
                return re.search(pattern, name, re.ASCII) is not None
        except re.error:
            pass
        self.document.refuse(f"{pattern!r:.80} beside other properties is not supported", where)
        return False

    def _pairs(
        self, pairs: list[tuple[str, bool]], other: str, least: int, most: int | None
    ) -> str:
        """Declared properties in their order, then others; how many at least and at most."""
        if least <= sum(is_required for _, is_required in pairs):
            least = 0
        if most is not None and most >= len(pairs) and other == NOTHING:
            most = None
        if least <= 1 and most is None:
            begin, _ = self._in_order(pairs)
            none = NOTHING if any(is_required for _, is_required in pairs) else _EMPTY
            some = self._sequence(begin, self._repeat(other, 0, None, False))
            return self._any_of(
                [some, self._sequence(none, self._repeat(other, least, None, True))]
            )
        return self._counted(pairs, other, least, most)

    def _in_order(self, pairs: list[tuple[str, bool]]) -> tuple[str, str]:
        """Those of the properties that come first in their object, one at least, and any after
        others. Rules that halve them keep the stack of the library low."""
        if len(pairs) < 2:
            [(pair, is_required)] = pairs or [(NOTHING, True)]
            after = self._sequence(_COMMA, pair)
            return pair, after if is_required else self._any_of([after, _EMPTY])
        half = len(pairs) // 2
        (first, after), (second, rest) = self._in_order(pairs[:half]), self._in_order(pairs[half:])
        skipped = NOTHING if any(is_required for _, is_required in pairs[:half]) else second
        begin = self._any_of([self._sequence(first, rest), skipped])
        return begin, self._sequence(after, rest)

    def _counted(
        self, pairs: list[tuple[str, bool]], other: str, least: int, most: int | None
    ) -> str:
        """So many properties. NOTHING if it would take too many rules."""
        if len(pairs) > _MAX_COUNTED:
            return NOTHING
        # The rest of an object after so many properties. More than `enough` need not be told apart.
        enough = max(1, len(pairs) if most is not None else min(least, len(pairs)))
        rests = [self._others(other, least, most, count) for count in range(enough + 1)]
        for index, (pair, is_required) in reversed([*enumerate(pairs)]):
            found = []
            for count in range(min(index, enough) + 1):
                taken = NOTHING
                if most is None or count < most:
                    comma = _COMMA if count else _EMPTY
                    taken = self._sequence(comma, pair, rests[min(count + 1, enough)])
                found.append(self._any_of([taken, NOTHING if is_required else rests[count]]))
            rests = found
        return rests[0]

    def _others(self, other: str, least: int, most: int | None, count: int) -> str:
        """Properties that are not declared, after `count` that are."""
        if least - count > 1:  # two of them may have the same name, which counts as one
            return NOTHING
        return self._repeat(other, least - count, None if most is None else most - count, not count)


def _with_an_end(kind: str, keywords: Json) -> Json | None:
    """A number's keywords and limits that end its digits. None if no number is valid."""
    keywords = dict(keywords)
    if "exclusiveMinimum" not in keywords:
        keywords.setdefault("minimum", -MAX_NUMBER)
    if "exclusiveMaximum" not in keywords:
        keywords.setdefault("maximum", MAX_NUMBER)
    low = max(keywords[key] for key in ("minimum", "exclusiveMinimum") if key in keywords)
    high = min(keywords[key] for key in ("maximum", "exclusiveMaximum") if key in keywords)
    tried = [math.ceil(low), math.ceil(low) + 1]
    if kind == "number":
        tried += [low, (low + high) / 2]
    limits = {key: value for key, value in keywords.items() if key != "multipleOf"}
    if not any(holds(limits, number) for number in tried):
        return None
    if high - low <= 1:
        # The library lets 2 pass between exclusive 2 and 2.5, not between 2.000001 and 2.5.
        for key, side in (("exclusiveMinimum", 1), ("exclusiveMaximum", -1)):
            if key in keywords:
                keywords[key] += side * (1e-6 + abs(keywords[key]) * 1e-12)
    is_wide = high == low or high - low >= 1e-5
    if kind == "number" and is_wide:
        keywords.setdefault("multipleOf", _DECIMALS)
    return keywords
