"""Sources of grammars, each translated to one EBNF text. Runs in the compiling process."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from .ebnf import Rules, literal
from .json_schema import SchemaWriter
from .problems import SourceError
from .regex import PatternWriter
from .tool_calls import CallWriter

FormatKind = Literal["json_schema", "json_object", "json", "regex", "choice", "ebnf"]
Calls = Literal["no", "may", "must"]


class OutputFormat(msgspec.Struct, frozen=True):
    """The required form of a reply's text. `source` is a schema, a pattern, a list of texts or
    EBNF, by `kind`; `field` is the client's field that asked for it."""

    kind: FormatKind
    source: Any
    field: str


class GrammarSource(msgspec.Struct, frozen=True):
    """All that decides a grammar: the text's format and the calls that may or must be made.
    `functions` are {name, parameters, strict}, and `fields` where each was declared."""

    format: OutputFormat | None
    calls: Calls = "no"
    parallel: bool = True
    functions: tuple[dict[str, Any], ...] = ()
    fields: tuple[str, ...] = ()


class FieldError(Exception):
    """A part of the source is wrong: `field` names it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def to_ebnf(source: GrammarSource, tags: Mapping[str, int]) -> str:
    """The grammar of `source`; `tags` gives the ids of the tool-call tags. Raises FieldError."""
    form = source.format
    if form is not None and form.kind == "ebnf":
        return str(form.source)
    rules = Rules()
    writer = CallWriter(rules, tags) if source.calls != "no" else None
    calls = _calls(rules, source, writer) if writer else ""
    if source.calls == "must":
        roots = [calls]
    elif form is None:
        assert writer is not None, "without a format there are calls"
        roots = [f"{writer.free_text()} ({calls})?"]
    else:
        roots = [_format(rules, form), *([calls] if calls else [])]
    try:
        return rules.text(roots)
    except SourceError as error:
        raise FieldError(form.field if form else source.fields[0], str(error)) from None


def _calls(rules: Rules, source: GrammarSource, writer: CallWriter) -> str:
    """One call or more of any of the functions."""
    found = []
    for function, field in zip(source.functions, source.fields, strict=True):
        try:
            found.append(writer.call(function, "#"))
        except (SourceError, RecursionError) as error:
            raise _field_error(field, error) from None
    call = rules.add(found)
    return f"{call}+" if source.parallel else call


def _format(rules: Rules, form: OutputFormat) -> str:
    try:
        match form.kind:
            case "json_schema":
                return SchemaWriter(rules, form.source).value(form.source)
            case "json_object":
                return SchemaWriter(rules, True).any_object()
            case "json":
                return SchemaWriter(rules, True).any_value()
            case "regex":
                return PatternWriter(rules).write(form.source, '""')
            case "choice":
                return rules.add([literal(text) for text in form.source])
    except (SourceError, RecursionError) as error:
        raise _field_error(form.field, error) from None
    raise AssertionError(f"{form.kind} has no rules of its own")


def _field_error(field: str, error: Exception) -> FieldError:
    return FieldError(field, str(error) if isinstance(error, SourceError) else "nested too deeply")
