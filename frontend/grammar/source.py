"""Sources of grammars, each translated to one Lark text. Runs in the checking process."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from .document import Document
from .keywords import Json, SchemaError
from .lark import TEXT, Lark, choice, pattern
from .schema import SchemaWriter
from .tool_calls import CallWriter

FormatKind = Literal["json_schema", "json_object", "json", "regex", "choice", "grammar"]
Calls = Literal["no", "may", "must"]
_MAX_DEFINITIONS = 1000
_MAX_TEXT = 1000 << 10  # bytes; it is one string of a message


class OutputFormat(msgspec.Struct, frozen=True):
    """The required form of a reply's text. `source` is a schema, a pattern, a list of texts, or a
    Lark or EBNF grammar, by `kind`; `field` is the client's field that asked for it."""

    kind: FormatKind
    source: Any
    field: str


class GrammarSource(msgspec.Struct, frozen=True):
    """All that decides a grammar: the text's format and the calls that may or must be made.
    `functions` are {name, parameters, strict}, and `fields` where each was declared."""

    format: OutputFormat | None
    calls: Calls = "no"
    parallel: bool = True
    functions: tuple[Json, ...] = ()
    fields: tuple[str, ...] = ()

    @property
    def largest_field(self) -> str:
        """The field of the largest part."""
        pairs = zip(self.functions, self.fields, strict=True)
        sizes = [(len(msgspec.json.encode(function)), field) for function, field in pairs]
        if self.format is not None:
            sizes.append((len(msgspec.json.encode(self.format)), self.format.field))
        return max(sizes)[1]


class FieldError(Exception):
    """A part of the source is wrong: `field` names it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def compose(source: GrammarSource, tags: Mapping[str, int], problem: Callable[[str], str]) -> str:
    """The grammar of `source`; `tags` gives the ids of the tool-call tags. `problem` says what is
    wrong with a grammar for the library, or "". Raises FieldError."""
    text = _compose(source, tags, problem)
    if len(text.encode()) > _MAX_TEXT:
        raise FieldError(source.largest_field, f"has more than {_MAX_TEXT >> 10} kB as a grammar")
    if not (error := problem(text)):
        return text
    form = source.format
    if form is not None and form.kind == "grammar" and form.source != text:
        raise FieldError(form.field, f"is not valid after its conversion to Lark: {error}")
    if form is not None and (source.calls == "no" or (error := problem(_format_alone(form)))):
        raise FieldError(form.field, error)
    wrong = set()
    for n, (function, field) in enumerate(zip(source.functions, source.fields, strict=True)):
        alone = GrammarSource(None, "must", False, (function,), (field,))
        if error := problem(_compose(alone, tags, problem)):
            wrong.add(n)
            if function.get("strict"):
                raise FieldError(field, error)
    text = _compose(source, tags, problem, wrong)
    if error := problem(text):
        raise FieldError(source.largest_field, error)
    return text


def _compose(
    source: GrammarSource,
    tags: Mapping[str, int],
    problem: Callable[[str], str],
    carefully: set[int] | None = None,
) -> str:
    form = source.format
    if form is not None and form.kind == "grammar":
        return _written(form)
    lark = Lark()
    if source.calls == "no":
        assert form is not None, "without calls there is a format"
        return lark.text(_format(lark, form))
    writer = CallWriter(lark, tags, problem)
    found = []
    for n, (function, field) in enumerate(zip(source.functions, source.fields, strict=True)):
        try:
            found.append(writer.call(function, n in (carefully or ())))
        except SchemaError as error:
            raise FieldError(field, str(error)) from None
    call = lark.any_of(found)
    if source.calls == "must":
        return lark.text(f"{call}+" if source.parallel else call)
    if form is None:
        return lark.text(f"{TEXT} {call}{'*' if source.parallel else '?'}")
    return lark.text(f"{_format(lark, form)} | {call}{'+' if source.parallel else ''}")


def _format_alone(form: OutputFormat) -> str:
    lark = Lark()
    return lark.text(_format(lark, form))


def _format(lark: Lark, form: OutputFormat) -> str:
    try:
        match form.kind:
            case "json_schema":
                return SchemaWriter(lark, Document(form.source)).value(form.source)
            case "json_object":
                return SchemaWriter(lark, Document({})).value({"type": "object"})
            case "json":
                return SchemaWriter(lark, Document({})).value(True)
            case "regex":
                return lark.terminal(pattern(form.source))
            case "choice":
                return lark.terminal(choice(form.source))
    except SchemaError as error:
        raise FieldError(form.field, str(error)) from None
    except ValueError as error:
        raise FieldError(form.field, f"is not a valid pattern: {error}") from None
    raise AssertionError(f"{form.kind} is not written here")


def _written(form: OutputFormat) -> str:
    """A grammar that a client wrote, as Lark."""
    text: str = form.source
    if "::=" in text:
        from llguidance.gbnf_to_lark import gbnf_to_lark  # only the checking process needs it

        try:
            text = gbnf_to_lark(text)
        except RecursionError:
            raise FieldError(form.field, "is nested too deeply") from None
        except Exception as error:  # the library raises no narrower class
            raise FieldError(form.field, f"is not a valid EBNF grammar: {error!s:.200}") from None
    if len(re.findall(r"^[ \t]*[?!]?[\w.-]+[^:\n]*:", text, re.MULTILINE)) > _MAX_DEFINITIONS:
        raise FieldError(form.field, f"has more than {_MAX_DEFINITIONS} definitions")
    return text
