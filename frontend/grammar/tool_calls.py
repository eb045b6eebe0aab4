"""Tool calls in GLM's format as EBNF rules:

    <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>

The tags are tokens of their own, which text cannot spell. String parameters are plain text, all
others JSON by their schema; required ones are there, in the order in which they are declared.
Schemas of strict functions hold to the letter or are refused, others are widened (`widen.py`).
"""

from collections.abc import Mapping
from typing import Any

from .document import Document
from .ebnf import ANY_CHAR, Rules, char_class, literal, token
from .json_schema import MAX_DEPTH, SchemaWriter
from .keywords import counts, types_of
from .merge import ANNOTATIONS, Json
from .problems import SourceError
from .regex import plain_chars
from .strings import dump
from .widen import widen

TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)


_KEY = [(0x21, 0x7E)]  # characters of an argument's name that the tool does not declare


class CallWriter:
    """Writes calls of declared functions into `rules`; `tags`: the id of each of TAGS."""

    def __init__(self, rules: Rules, tags: Mapping[str, int]) -> None:
        self._rules = rules
        self._tags = {tag: token(tags[tag]) for tag in TAGS}

    def call(self, function: Json, where: str) -> str:
        """A rule for one call of a function {name, parameters, strict}. Raises SourceError."""
        begin, end = self._tags["<tool_call>"], self._tags["</tool_call>"]
        parameters = function.get("parameters") or {}
        writer = SchemaWriter(self._rules, parameters, None if function.get("strict") else widen)
        objects = _objects(writer.document, parameters, where)
        if not objects:
            raise SourceError("type must be object", where)
        arguments = self._rules.add([self._arguments(writer, o, at) for at, o in objects])
        return self._rules.add([f"{begin} {literal(function['name'])} {arguments} {end}"])

    def free_text(self) -> str:
        """Any text without tags."""
        return self._rules.once("text", lambda name: ['""', f"{char_class(ANY_CHAR)} {name}"])

    def _arguments(self, writer: SchemaWriter, schema: Json, where: str) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise SourceError("properties must be an object and required a list", where)
        if counts(schema, "Properties", where) != (0, None):
            writer.document.refuse("minProperties and maxProperties are not supported here", where)
        extra = schema.get("additionalProperties")
        for name in required:
            if not isinstance(name, str):
                raise SourceError("required must hold strings", where)
            if name not in properties and extra is False:
                raise SourceError(f"{name!r:.80} is required but not allowed", where)
        declared = {**dict.fromkeys(required, True), **properties}
        order = [*properties, *(name for name in declared if name not in properties)]
        parts = []
        for name in order:
            if declared[name] is False:
                continue
            pair = self._pair(writer, literal(name), declared[name], f"{where}/properties/{name}")
            parts.append(pair if name in required else f"({pair})?")
        if extra and not properties:
            key = char_class(_KEY)
            free = self._rules.once("argument", lambda name: [f"{key} {name}", key])
            pair = self._pair(writer, free, extra, f"{where}/additionalProperties")
            parts.append(f"({pair})*")
        return self._rules.add([" ".join(parts) or '""'])

    def _pair(self, writer: SchemaWriter, key: str, schema: Any, where: str) -> str:
        value = self._value(writer, schema, where)
        tags = self._tags
        name = f"{tags['<arg_key>']} {key} {tags['</arg_key>']}"
        return self._rules.add([f"{name} {tags['<arg_value>']} {value} {tags['</arg_value>']}"])

    def _value(
        self, writer: SchemaWriter, schema: Any, where: str, entered: frozenset[str] = frozenset()
    ) -> str:
        """The text of one value: strings as they are, everything else as JSON. `entered`: $refs
        that led here."""
        document = writer.document
        schema = document.opened(schema, where)
        if not isinstance(schema, dict) or not schema.keys() - ANNOTATIONS:
            return writer.value(schema, where) if schema is False else self.free_text()
        if "$ref" in schema:
            pointer = schema["$ref"]
            others = {k: v for k, v in schema.items() if k != "$ref" and k not in ANNOTATIONS}
            target = document.merge(document.resolve(pointer, where), others, where)
            if pointer in entered:
                document.refuse(f"$ref {pointer!r:.80} leads back to itself", where)
                return self.free_text()
            return self._value(writer, target, where, entered | {pointer})
        if "allOf" in schema:
            return self._value(writer, document.all_of(schema, where), where, entered)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                parts = document.branches(schema, key, where)
                found = [self._value(writer, part, at, entered) for at, part in parts.items()]
                return self._any_of(found or [self.free_text()])
        if "enum" in schema or "const" in schema:
            values = writer.choices(schema, where)
            return self._rules.add([literal(v if isinstance(v, str) else dump(v)) for v in values])
        return self._typed(writer, schema, where)

    def _typed(self, writer: SchemaWriter, schema: Json, where: str) -> str:
        kinds = types_of(schema, where)
        if "string" not in kinds:
            return writer.value(schema, where)
        text = self.free_text()
        if any(key in schema for key in ("minLength", "maxLength", "pattern", "format")):
            text = writer.text(schema, where, '""', plain_chars)
        others = [kind for kind in kinds if kind != "string"]
        if not others or text == self.free_text():
            return text
        return self._any_of([text, writer.value({**schema, "type": others}, where)])

    def _any_of(self, found: list[str]) -> str:
        return self.free_text() if self.free_text() in found else self._rules.add(found)


def _objects(document: Document, schema: Any, where: str) -> list[tuple[str, Json]]:
    """The object schemas of a function's parameters, and where they are: one, or those of an
    anyOf that are about objects."""
    for _ in range(MAX_DEPTH):
        schema = document.opened(schema, where)
        if not isinstance(schema, dict):
            return []
        if "$ref" in schema:
            others = {k: v for k, v in schema.items() if k != "$ref"}
            target = document.resolve(schema["$ref"], where)
            if target is True:  # it leads nowhere, so nothing is known of the arguments
                target = {"additionalProperties": True}
            schema = document.merge(target, others, where)
        elif "allOf" in schema:
            schema = document.all_of(schema, where)
        elif key := next((key for key in ("anyOf", "oneOf") if key in schema), ""):
            parts = document.branches(schema, key, where)
            return [pair for at, part in parts.items() for pair in _objects(document, part, at)]
        else:
            return [(where, schema)] if "object" in types_of(schema, where) else []
    raise SourceError("$ref leads back to itself", where)
