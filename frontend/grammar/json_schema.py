"""JSON Schema -> EBNF rules for JSON text that is valid under the schema.

The grammar is as strict as the schema or stricter, never laxer, and it leaves no room to dawdle:
one spelling of white space (", " and ": "), properties in the order in which they are declared,
none that are not declared unless `additionalProperties` says so. Schemas that it cannot express are
refused. `oneOf` is read as `anyOf`; unknown formats are annotations, as the standard has them.
"""

from collections.abc import Callable
from typing import Any

from . import numbers
from .document import Document
from .ebnf import ANY_CHAR, Rules, char_class, chars, complement, intersect, literal
from .keywords import MAX_CHOICES, MAX_COUNT, TYPES, counts, is_of_type, limits, types_of
from .merge import ANNOTATIONS, Json, Schema
from .problems import SourceError
from .regex import Alternatives, PatternWriter
from .strings import ANY_ESCAPE, FORMATS, PLAIN, QUOTE, dump, string_chars

MAX_DEPTH = 200


class SchemaWriter:
    """Writes one schema document's parts into `rules`. Raises SourceError; with `widen`, which
    each schema is put through before it is written, for what is too large only."""

    def __init__(
        self, rules: Rules, document: Any, widen: Callable[[Any], Schema] | None = None
    ) -> None:
        self._rules = rules
        self.document = Document(document, widen)
        self._by_pointer: dict[str, str] = {}
        self._entered: list[str] = []  # $refs followed since the last character was written

    def value(self, schema: Any, where: str = "#", depth: int = 0) -> str:
        """An expression for the JSON values that are valid under `schema`."""
        if depth > MAX_DEPTH:
            self.document.refuse(f"nested deeper than {MAX_DEPTH}", where)
            return self.any_value()
        schema = self.document.opened(schema, where)
        if schema is True or schema == {}:
            return self.any_value()
        if schema is False:
            raise SourceError("matches nothing", where)
        if "$ref" in schema:
            return self._reference(schema, where, depth)
        if "allOf" in schema:
            return self.value(self.document.all_of(schema, where), where, depth + 1)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                parts = self.document.branches(schema, key, where)
                found = [self.value(part, place, depth + 1) for place, part in parts.items()]
                return self._rules.add(found) if found else self.any_value()
        if "const" in schema or "enum" in schema:
            return self._rules.add([literal(dump(v)) for v in self.choices(schema, where)])
        found = [self._typed(kind, schema, where, depth) for kind in types_of(schema, where)]
        if not found:
            raise SourceError("matches nothing", where)
        return self._rules.add(found)

    def any_value(self) -> str:
        """Any JSON value."""

        def write(name: str) -> Alternatives:
            items = f'"[" ({name} ({literal(", ")} {name})*)? "]"'
            found = [self.any_object(), self._rules.add([items]), self.any_string()]
            return [*found, self._number(), *map(literal, ("true", "false", "null"))]

        return self._rules.once("value", write)

    def any_object(self) -> str:
        """Any JSON object."""

        def write(_: str) -> Alternatives:
            pair = f"{self.any_string()} {literal(': ')} {self.any_value()}"
            return [f'"{{" ({pair} ({literal(", ")} {pair})*)? "}}"']

        return self._rules.once("object", write)

    def any_string(self) -> str:
        """Any JSON string."""

        return self._rules.once("string", lambda _: [f"{QUOTE} {self._string_rest()}"])

    def _string_rest(self) -> str:
        """The rest of any string and the quote after it."""

        def write(name: str) -> Alternatives:
            return [QUOTE, f"{char_class(PLAIN)} {name}", f"{ANY_ESCAPE} {name}"]

        return self._rules.once("string rest", write)

    def _number(self) -> str:
        return self._rules.once("number", lambda _: [numbers.NUMBER])

    # --- references and combinations -------------------------------------------------------

    def _reference(self, schema: Json, where: str, depth: int) -> str:
        pointer = schema["$ref"]
        target = self.document.resolve(pointer, where)
        others = {k: v for k, v in schema.items() if k != "$ref" and k not in ANNOTATIONS}
        if pointer in self._entered or len(self._entered) > MAX_DEPTH:
            self.document.refuse(f"$ref {pointer!r:.80} leads back to itself", where)
            return self.any_value()
        self._entered.append(pointer)
        try:
            key = pointer if not others else f"{pointer} {dump(others)}"
            if key not in self._by_pointer:
                name = self._by_pointer[key] = self._rules.reserve()
                merged = self.document.merge(target, others, where)
                self._rules.define(name, [self.value(merged, pointer, depth + 1)])
            return self._by_pointer[key]
        finally:
            self._entered.pop()

    def choices(self, schema: Json, where: str) -> list[Any]:
        """The values that const and enum allow."""
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, list):
            raise SourceError("enum must be a list", where)
        if len(values) > MAX_CHOICES:
            raise SourceError(f"enum must hold at most {MAX_CHOICES} values", where)
        if "const" in schema:
            values = [value for value in values if value == schema["const"]]
        kinds = types_of(schema, where) if "type" in schema else TYPES
        values = [value for value in values if any(is_of_type(value, kind) for kind in kinds)]
        if not values:
            raise SourceError("matches nothing", where)
        return values

    # --- types -------------------------------------------------------------------------------

    def _typed(self, kind: str, schema: Json, where: str, depth: int) -> str:
        match kind:
            case "boolean":
                return '"true" | "false"'
            case "null":
                return '"null"'
            case "integer" | "number":
                write = numbers.integer if kind == "integer" else numbers.number
                try:
                    return self._rules.add([write(limits(schema, where))])
                except SourceError as error:
                    raise SourceError(str(error), where) from None
            case "string":
                return f"{QUOTE} {self.text(schema, where, QUOTE, string_chars)}"
        entered, self._entered = self._entered, []
        try:
            if kind == "array":
                return self._array(schema, where, depth)
            return self._object(schema, where, depth)
        finally:
            self._entered = entered

    def text(self, schema: Json, where: str, end: str, write: Any) -> str:
        """A rule for the characters of a string, spelled by `write`, and `end` after them."""
        least, most = counts(schema, "Length", where)
        pattern = schema.get("pattern", FORMATS.get(str(schema.get("format"))))
        writer = PatternWriter(self._rules, write)
        try:
            if pattern is None:
                if (least, most) == (0, None) and write is string_chars:
                    return self._string_rest()
                return writer.repeat_chars(ANY_CHAR, least, most, end)
            if not isinstance(pattern, str):
                raise SourceError("pattern must be a string")
            if "pattern" in schema and (least, most) != (0, None):
                raise SourceError("a pattern and a length limit cannot be put together")
            return writer.write(pattern, end)
        except SourceError as error:
            raise SourceError(str(error), where) from None

    def _array(self, schema: Json, where: str, depth: int) -> str:
        least, most = counts(schema, "Items", where)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list) or len(first) > MAX_COUNT:
            raise SourceError(f"prefixItems must be a list of at most {MAX_COUNT}", where)
        items = [
            self.value(part, f"{where}/prefixItems/{n}", depth + 1) for n, part in enumerate(first)
        ]
        other = None
        if schema.get("items", True) is not False and (most is None or most > len(items)):
            other = self.value(schema.get("items", True), f"{where}/items", depth + 1)
        elif most is None or most > len(items):
            most = len(items)
        if most is not None and least > most:
            raise SourceError("matches nothing: too few items are possible", where)
        end, comma = literal("]"), literal(", ")
        fixed = len(items) if most is None else most
        if most is None and other is not None:
            fixed = max(least, len(items))
            rest = self._rest(end, other)
            after = rest if fixed else self._rules.add([end, f"{other} {rest}"])
        else:
            after = end
        for index in range(fixed - 1, -1, -1):
            item = items[index] if index < len(items) else other
            step = f"{comma} {item} {after}" if index else f"{item} {after}"
            after = self._rules.add([step, end] if index >= least else [step])
        return f'"[" {after}'

    def _object(self, schema: Json, where: str, depth: int) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise SourceError("properties must be an object and required a list", where)
        if not all(isinstance(name, str) for name in required):
            raise SourceError("required must hold strings", where)
        extra = schema.get("additionalProperties", None if properties or required else True)
        missing = [name for name in dict.fromkeys(required) if name not in properties]
        declared = {**properties, **dict.fromkeys(missing, extra if extra else True)}
        if missing and extra is False:
            raise SourceError(f"{missing[0]!r:.80} is required but not allowed", where)
        pairs = []
        for name, part in declared.items():
            if part is False and name not in required:
                continue
            value = self.value(part, f"{where}/properties/{name}", depth + 1)
            pairs.append((f"{literal(dump(name) + ': ')} {value}", name in required))
        least, most = counts(schema, "Properties", where)
        num_required = len(set(required))
        if pairs and (least > num_required or (most is not None and most < len(pairs))):
            raise SourceError(
                "minProperties and maxProperties are supported for undeclared properties only",
                where,
            )
        other = None
        if extra is not None and extra is not False:
            place = f"{where}/additionalProperties"
            value = self.value(extra, place, depth + 1)
            other = f"{QUOTE} {self._other_key(list(declared))} {literal(': ')} {value}"
        if not pairs:
            return '"{" ' + self._free_pairs(other, least, most, where)
        if most is not None:
            other = None  # all that are allowed are declared
        return '"{" ' + self._pairs(pairs, other)

    def _pairs(self, pairs: list[tuple[str, bool]], other: str | None) -> str:
        """Declared properties in order, those that are not required optional, then others."""
        end, comma = literal("}"), literal(", ")
        after = [end]  # what may follow once a property was written
        begin = [end]  # the same while there is none
        if other is not None:
            rest = self._rest(end, other)
            after, begin = [rest], [end, f"{other} {rest}"]
        for pair, required in reversed(pairs):
            following = self._rules.add(after)
            skip_after = [] if required else [following]
            skip_begin = [] if required else [self._rules.add(begin)]
            after = [f"{comma} {pair} {following}", *skip_after]
            begin = [f"{pair} {following}", *skip_begin]
        return self._rules.add(begin)

    def _free_pairs(self, other: str | None, least: int, most: int | None, where: str) -> str:
        end, comma = literal("}"), literal(", ")
        if least > 1:
            raise SourceError("minProperties above 1 is not supported: keys may be equal", where)
        if other is None or most == 0:
            if least:
                raise SourceError(
                    "matches nothing: properties are required but none allowed", where
                )
            return end
        rest = end
        if most is None:
            rest = self._rest(end, other)
        count = max(1, least) if most is None else most
        for index in range(count - 1, -1, -1):
            step = f"{comma} {other} {rest}" if index else f"{other} {rest}"
            rest = self._rules.add([step, end] if index >= least else [step])
        return rest

    def _rest(self, end: str, other: str) -> str:
        """`end`, or first any number of `other`, each after a comma."""
        return self._rules.once(
            f"rest {end} {other}", lambda name: [end, f"{literal(', ')} {other} {name}"]
        )

    def _other_key(self, names: list[str]) -> str:
        """A key that is none of `names`, and the quote after it. Without escapes, so that no
        name has a second spelling."""
        if not names:
            return self._string_rest()
        free = self._rules.once("key", lambda name: [QUOTE, f"{char_class(PLAIN)} {name}"])
        return self._key_state(names, free)

    def _key_state(self, names: list[str], free: str) -> str:
        """`names` are the rests of those that the key may still become."""
        tails: dict[str, list[str]] = {}
        for name in names:
            if name:
                tails.setdefault(name[0], []).append(name[1:])
        found = [] if "" in names else [QUOTE]
        for char, rests in tails.items():
            if intersect(PLAIN, chars(char)):
                found.append(f"{literal(char)} {self._key_state(rests, free)}")
        others = intersect(PLAIN, complement(chars("".join(tails))))
        return self._rules.add([*found, f"{char_class(others)} {free}"])
