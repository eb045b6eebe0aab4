"""Chat templates: their language, and a `Renderer` that runs one in a process of its own.

A template is a program that comes with a checkpoint. It runs in Jinja's sandbox in another process
(`template_child.py`, started and killed by `child.py`). Its setup is {"template": ...,
"variables": {...}, "added": [...]}. Each message holds the arguments of one rendering. The answer
is "=" and the text, "~" and the text with stand-ins (`control.py`), or "!" and the error.
"""

import datetime
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...shared.errors import RequestError
from ..child import ChildDiedError, KillableChild

_LIMIT_S = 10.0
_NOT_ASCII = re.compile("[^\x00-\x7f\udc00-\udfff]+")
_encode = msgspec.json.encode


class Rendered(NamedTuple):
    """A prompt's text."""

    text: str
    has_stand_ins: bool  # for spellings of added tokens in the arguments: `control.py`


class Renderer:
    """Renders one template. Used from one thread, which may block. `variables` (the special
    tokens) are passed to each rendering. `added` are the texts of all added tokens."""

    def __init__(
        self,
        template: str,
        variables: dict[str, Any],
        limit_s: float = _LIMIT_S,
        added: Sequence[str] = (),
    ) -> None:
        self.template, self.variables = template, variables
        setup = _encode({"template": template, "variables": variables, "added": added})
        self.child = KillableChild(f"{__package__}.template_child", setup, limit_s)

    def render(self, arguments: dict[str, Any]) -> Rendered:
        """The text. Raises RequestError when the template fails on its arguments or exceeds the
        time limit."""
        try:
            message = _encode(arguments)
        except RecursionError:
            raise _failed("cannot take them: they are nested too deeply") from None
        # The second attempt is for a process that has died for another reason.
        answer = self._ask(message) or self._ask(message)
        if not answer:
            raise _failed("broke down on them")
        text = answer[1:].decode("utf-8", "surrogatepass")
        if answer[:1] == b"!":
            raise _failed(f"fails on them: {text}")
        return Rendered(text, answer[:1] == b"~")

    def _ask(self, message: bytes) -> bytes:
        """The answer; empty if the process has died."""
        try:
            return self.child.ask(message)
        except TimeoutError:
            problem = f"took longer than {self.child.limit_s:g} s on them"
            raise TooSlowError(str(_failed(problem)), field="messages") from None
        except ChildDiedError:
            return b""


class TooSlowError(RequestError):
    """Rendering took too long, perhaps because the machine is busy."""


def _failed(problem: str) -> RequestError:
    return RequestError(f"messages: the chat template {problem}", field="messages")


# --- the language ---


def check_template(template: str) -> None:
    """Raises ValueError naming the line where a template's syntax is wrong."""
    try:
        make_environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error


def make_environment() -> ImmutableSandboxedEnvironment:
    """The language of chat templates, as transformers defines it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


class _Generation(Extension):
    """{% generation %} marks text for training. It has no effect here."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's content alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that lead to Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r}")
        super().__setitem__(name, value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if ensure_ascii:  # but for stand-ins
        return _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text)
    return text


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
