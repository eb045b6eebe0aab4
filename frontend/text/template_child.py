"""The process that renders chat templates (`python -m glimmer.frontend.text.template_child PID`).

A template is a program that came with a checkpoint. It runs in Jinja's sandbox, in a process that
may hang, swell or die without harm: `template.py` starts it, waits for so long, and kills it.

Both directions on standard input, a socket: 4 bytes of length, big-endian, then the message. The
first message is {"template": ..., "variables": {...}}; each other one holds the template's
arguments, and is answered with "=" and the text, or "!" and what went wrong.
"""

import datetime
import json
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...shared.lifecycle import die_with_parent

_MAX_MEMORY = 4 << 30  # bytes of address space
_LENGTH = struct.Struct("!I")


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


def send(link: socket.socket, message: bytes) -> None:
    """One message. Raises OSError."""
    link.sendall(_LENGTH.pack(len(message)) + message)


def receive(link: socket.socket) -> bytes:
    """One message; b"" when the other side has gone. Raises OSError."""
    length = _LENGTH.unpack(_read(link, _LENGTH.size) or bytes(_LENGTH.size))[0]
    return _read(link, length)


def _read(link: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = link.recv(min(length - len(data), 1 << 20))
        if not piece:
            return b""
        data += piece
    return bytes(data)


class _Generation(Extension):
    """{% generation %} marks what is trained on: nothing to us."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's content alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that lead to Python's internals."""

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
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _answer(render: Callable[..., str], variables: dict[str, Any], message: bytes) -> bytes:
    try:
        text = render({**variables, **msgspec.json.decode(message)})
        return b"=" + text.encode("utf-8", "replace")
    except Exception as error:  # whatever a template may raise
        return b"!" + f"{type(error).__name__}: {error}"[:1000].encode("utf-8", "replace")


def main() -> int:
    """Answer until the other side goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    die_with_parent(int(sys.argv[1]), None)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    with socket.socket(fileno=0) as link:
        start = msgspec.json.decode(receive(link))
        render = make_environment().from_string(start["template"]).render
        send(link, b"ready")
        while message := receive(link):
            send(link, _answer(render, start["variables"], message))
    return 0


if __name__ == "__main__":
    sys.exit(main())
