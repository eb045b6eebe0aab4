"""Tool calls in GLM's format as EBNF rules:

    <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>

The tags are tokens of their own, which text cannot spell. String parameters are plain text, all
others JSON by their schema; required ones are there, in the order in which they are declared.
"""

from collections.abc import Mapping
from typing import Any

from .ebnf import ANY_CHAR, Rules, char_class, literal, token
from .json_schema import MAX_DEPTH, SchemaWriter
from .merge import ANNOTATIONS, Json, merge
from .problems import SourceError
from .regex import plain_chars
from .strings import dump

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
        """A rule for one call of a function {name, parameters}. Raises SourceError."""
        begin, end = self._tags["<tool_call>"], self._tags["</tool_call>"]
        arguments = self._arguments(function.get("parameters") or {}, where)
        return self._rules.add([f"{begin} {literal(function['name'])} {arguments} {end}"])

    def free_text(self) -> str:
        """Any text without tags."""
        return self._rules.once("text", lambda name: ['""', f"{char_class(ANY_CHAR)} {name}"])

    def _arguments(self, parameters: Json, where: str) -> str:
        writer = SchemaWriter(self._rules, parameters)
        schema = _flatten(writer, parameters, where)
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise SourceError("properties must be an object and required a list", where)
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
        value = self._value(writer, schema, where, 0)
        tags = self._tags
        name = f"{tags['<arg_key>']} {key} {tags['</arg_key>']}"
        return self._rules.add([f"{name} {tags['<arg_value>']} {value} {tags['</arg_value>']}"])

    def _value(self, writer: SchemaWriter, schema: Any, where: str, depth: int) -> str:
        """The text of one value: strings as they are, everything else as JSON."""
        if depth > MAX_DEPTH:
            raise SourceError("$ref leads back to itself", where)
        if not isinstance(schema, dict) or not schema.keys() - ANNOTATIONS:
            return writer.value(schema, where) if schema is False else self.free_text()
        if "$ref" in schema:
            others = {k: v for k, v in schema.items() if k != "$ref" and k not in ANNOTATIONS}
            target = merge(writer.resolve(schema["$ref"], where), others, where)
            return self._value(writer, target, where, depth + 1)
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                rest = {k: v for k, v in schema.items() if k != key and k not in ANNOTATIONS}
                parts = [merge(part, rest, where) if rest else part for part in schema[key]]
                found = [self._value(writer, part, where, depth + 1) for part in parts]
                return self._rules.add(found)
        if "enum" in schema or "const" in schema:
            return self._choice(writer, schema, where)
        return self._typed(writer, schema, where)

    def _choice(self, writer: SchemaWriter, schema: Json, where: str) -> str:
        writer.value(schema, where)  # refuses what is wrong with it
        values = [schema["const"]] if "const" in schema else schema["enum"]
        texts = [value if isinstance(value, str) else dump(value) for value in values]
        return self._rules.add([literal(text) for text in texts])

    def _typed(self, writer: SchemaWriter, schema: Json, where: str) -> str:
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if "string" not in kinds:
            return writer.value(schema, where)
        limits = ("minLength", "maxLength", "pattern", "format")
        text = self.free_text()
        if any(key in schema for key in limits):
            text = writer.text(schema, where, '""', plain_chars)
        others = [kind for kind in kinds if kind != "string"]
        if not others:
            return text
        return self._rules.add([text, writer.value({**schema, "type": others}, where)])


def _flatten(writer: SchemaWriter, schema: Any, where: str) -> Json:
    """The object schema of a function's parameters, a $ref or allOf at its top resolved."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, dict):
            raise SourceError("parameters must be an object schema", where)
        if "$ref" in schema:
            others = {k: v for k, v in schema.items() if k != "$ref"}
            schema = merge(writer.resolve(schema["$ref"], where), others, where)
        elif isinstance(schema.get("allOf"), list):
            whole: Any = {k: v for k, v in schema.items() if k != "allOf"}
            for part in schema["allOf"]:
                whole = merge(whole, part, where)
            schema = whole
        else:
            kind = schema.get("type", "object")
            if kind != "object" and kind != ["object"]:
                raise SourceError("type must be object", where)
            return schema
    raise SourceError("$ref leads back to itself", where)
