"""Tool calls in GLM's format as Lark rules:

    <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>

The tags are tokens of their own, which text cannot spell. String parameters are plain text, all
others JSON by their schema; required ones are there, in the order in which they are declared.
Schemas of strict functions hold to the letter or are refused, others are widened.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..parsers.schemas import Schemas
from .document import Document
from .keywords import Json, SchemaError, dump, literals
from .lark import NOTHING, TEXT, Lark, choice, literal, search, token
from .schema import SchemaWriter

TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)
_KEY = "/[!-~]+/"  # an argument's name that the tool does not declare


class CallWriter:
    """Writes calls of declared functions into `lark`; `tags`: the id of each of TAGS. `problem`
    says what is wrong with a grammar for the library."""

    def __init__(self, lark: Lark, tags: Mapping[str, int], problem: Callable[[str], str]) -> None:
        self._lark, self._problem = lark, problem
        self._tags = {tag: token(tags[tag]) for tag in TAGS}

    def call(self, function: Json, carefully: bool = False) -> str:
        """A rule for one call of a function {name, parameters, strict}. `carefully`: ask for each
        parameter whether the library takes its schema. Raises SchemaError."""
        begin, end = self._tags["<tool_call>"], self._tags["</tool_call>"]
        is_strict = bool(function.get("strict"))
        document = Document(function.get("parameters") or {}, lenient=not is_strict)
        objects = _objects(document)
        if not objects:
            raise SchemaError("type must be object", "#")
        writer = SchemaWriter(self._lark, document)
        found = [self._arguments(writer, keywords, carefully) for keywords in objects]
        arguments = self._lark.any_of(found)
        return self._lark.rule(f"{begin} {literal(function['name'])} {arguments} {end}")

    def _arguments(self, writer: SchemaWriter, keywords: Json, carefully: bool) -> str:
        properties, required = keywords.get("properties", {}), keywords.get("required", [])
        extra = keywords.get("additionalProperties", False)
        if writer.document.is_strict:
            for key in ("minProperties", "maxProperties", "patternProperties", "allOf"):
                if key in keywords:
                    raise SchemaError(f"{key} is not supported here", "#")
            for name in required:
                if properties.get(name, keywords.get("additionalProperties", True)) is False:
                    raise SchemaError(f"{name!r:.80} is required but not allowed", "#")
        parts = []
        for name in dict.fromkeys((*properties, *required)):
            schema = properties.get(name, extra or True)
            if schema is False and name not in required:
                continue
            pair = self._pair(writer, literal(name), schema, f"#/properties/{name}", carefully)
            parts.append(pair if name in required else f"{pair}?")
        if "patternProperties" in keywords:
            extra = {"anyOf": [*keywords["patternProperties"].values(), extra]}
        if extra is not False and not properties:
            key = self._lark.terminal(_KEY)
            pair = self._pair(writer, key, extra, "#/additionalProperties", carefully)
            parts.append(f"{pair}*")
        return self._lark.rule(" ".join(parts) or '""')

    def _pair(
        self, writer: SchemaWriter, key: str, schema: Any, where: str, carefully: bool
    ) -> str:
        document = writer.document
        try:
            if carefully and not document.is_strict:
                trial = SchemaWriter(Lark(), document)
                if error := self._problem(trial.lark.text(_value(trial, schema, where))):
                    raise SchemaError(error, where)
            value = _value(writer, schema, where)
        except SchemaError:
            if document.is_strict:
                raise
            types = Schemas(document.root).types(schema)
            value = _value(writer, {"type": sorted(types)} if types else True, where)
        tags = self._tags
        name = f"{tags['<arg_key>']} {key} {tags['</arg_key>']}"
        return self._lark.rule(f"{name} {tags['<arg_value>']} {value} {tags['</arg_value>']}")


def _objects(document: Document) -> list[Json]:
    """The object schemas of a function's parameters: one, or those of an anyOf."""
    ways = document.alternatives(document.root)
    if ways == [{}] and "$ref" in document.root:  # it leads nowhere: nothing is known
        ways = [{"additionalProperties": True}]
    return [keywords for keywords in ways if "object" in keywords.get("type", ["object"])]


def _value(writer: SchemaWriter, schema: Any, where: str) -> str:
    """The text of one value, as the parser reads it: strings as they are, others as JSON."""
    lark, document = writer.lark, writer.document
    types = Schemas(document.root).types(schema)
    if types and "string" not in types:
        return writer.value(schema, where)
    found: list[str] = []
    for keywords in document.alternatives(schema, where):
        if (values := literals(keywords)) is not None:
            texts = [value if isinstance(value, str) else dump(value) for value in values]
            found += [lark.terminal(choice(texts))] if texts else []
        else:
            found += _typed(writer, keywords, where)
    if not found and document.is_strict:
        raise SchemaError("matches nothing", where)
    return TEXT if TEXT in found or not found else lark.any_of(found)


def _typed(writer: SchemaWriter, keywords: Json, where: str) -> list[str]:
    kinds = keywords.get("type", ["string"])
    texts = [_text(writer.lark, keywords, where)] if "string" in kinds else []
    others = {**keywords, "type": [kind for kind in kinds if kind != "string"]}
    if texts == [TEXT] or not others["type"]:
        return texts
    other = writer.typed(others, where)
    return [*texts, other] if other != NOTHING else texts


def _text(lark: Lark, keywords: Json, where: str) -> str:
    """Plain text."""
    bounds: list[str] = []
    for part in (keywords, *keywords.get("allOf", [])):
        least, most = part.get("minLength", 0), part.get("maxLength", "")
        if (least, most) != (0, ""):
            bounds.append(f"/(?s:.{{{least},{most}}})/")
        if "pattern" in part:
            try:
                bounds.append(search(part["pattern"]))
            except ValueError as error:
                raise SchemaError(f"pattern: {error}", where) from None
        if "enum" in part or "const" in part:
            values = part.get("enum", [part.get("const")])
            texts = [value for value in values if isinstance(value, str)]
            bounds.append(f"({choice(texts)})" if texts else NOTHING)
    return lark.terminal(" & ".join(bounds)) if bounds else TEXT
