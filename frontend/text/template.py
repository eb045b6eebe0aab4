"""Chat templates: their language, and a `Renderer` that runs one in a process of its own.

A template is a program that comes with a checkpoint. It runs in Jinja's sandbox in another process
(`template_child.py`), which is killed when it exceeds the time limit. The process is started with
the first prompt, and again after it was killed.

Both directions of the socket between the two: 4 bytes of length, big-endian, then the message. The
first message is {"template": ..., "variables": {...}}. Each later one holds the arguments of one
rendering; the answer is "=" and the text, or "!" and the error.
"""

import datetime
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...shared.errors import RequestError

_LIMIT_S = 10.0
_START_S = 30.0  # for the process to start on a busy machine
_LENGTH = struct.Struct("!I")
_encode = msgspec.json.encode


class Renderer:
    """Renders one template. Used from one thread, which may block. `variables` (the special
    tokens) are passed to each rendering."""

    def __init__(self, template: str, variables: dict[str, Any], limit_s: float = _LIMIT_S) -> None:
        self._template, self._variables, self._limit_s = template, variables, limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def start(self) -> socket.socket:
        """The socket to the process, which is started if it is not running. The process ends with
        the calling thread. Raises OSError when it does not start, or after `close`."""
        if self._link is not None:
            return self._link
        with self._lock:  # `close` must not run in between
            if self._is_closed:
                raise OSError("closed")
            self._link, theirs = socket.socketpair()
            link = self._link
            with theirs:
                module = f"{__package__}.template_child"
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", module, str(os.getpid())],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                )
        link.settimeout(_START_S)
        send(link, _encode({"template": self._template, "variables": self._variables}))
        receive(link)  # it is ready, or has died: then `render` fails
        return link

    def render(self, arguments: dict[str, Any]) -> str:
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
        text = answer[1:].decode()
        if answer[:1] == b"!":
            raise _failed(f"fails on them: {text}")
        return text

    def _ask(self, message: bytes) -> bytes:
        """The answer; empty if the process has died."""
        try:
            link = self._link or self.start()
            link.settimeout(self._limit_s)
            send(link, message)
            answer = receive(link)
        except TimeoutError:
            self._end()
            raise _failed(f"took longer than {self._limit_s:g} s on them") from None
        except OSError:
            answer = b""
        if not answer:
            self._end()
        return answer

    def close(self) -> None:
        """End the process for good. May be called from any thread, even during a rendering."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        with self._lock:
            process, link = self._process, self._link
            self._process, self._link = None, None
        if process is not None:
            process.kill()
            process.wait()
        if link is not None:
            link.close()


def _failed(problem: str) -> RequestError:
    return RequestError(f"messages: the chat template {problem}", field="messages")


# --- messages between the two processes ---


def send(link: socket.socket, message: bytes) -> None:
    """Send one message. Raises OSError."""
    link.sendall(_LENGTH.pack(len(message)) + message)


def receive(link: socket.socket) -> bytes:
    """Receive one message; b"" if the other side has closed. Raises OSError."""
    length = _LENGTH.unpack(_read(link, _LENGTH.size) or bytes(_LENGTH.size))[0]
    return _read(link, length)


def _read(link: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = link.recv(min(length - len(data), 1 << 20))
        if not chunk:
            return b""
        data += chunk
    return bytes(data)


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
