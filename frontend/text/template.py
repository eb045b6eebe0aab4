"""Chat templates, rendered in a process of their own (`template_child.py`) within a time limit.

Used from one thread, which may block. The process is started with the first prompt, and anew after
one that had to be killed.
"""

import os
import socket
import subprocess
import sys
import threading
from typing import Any

import jinja2
import msgspec

from ...shared.errors import RequestError
from .template_child import make_environment, receive, send

_LIMIT_S = 10.0
_START_S = 30.0  # for a process that starts on a busy machine
_encode = msgspec.json.encode


def check_template(template: str) -> None:
    """Raises ValueError saying where a template's syntax is wrong."""
    try:
        make_environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error


class Renderer:
    """One template. `variables` are given to each rendering (the special tokens)."""

    def __init__(self, template: str, variables: dict[str, Any], limit_s: float = _LIMIT_S) -> None:
        self._template, self._variables, self._limit_s = template, variables, limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def start(self) -> socket.socket:
        """Start the process, if it is not running: the way to it. It ends with the calling
        thread. Raises OSError when it does not start, or after `close`."""
        if self._link is not None:
            return self._link
        with self._lock:  # `close` comes before or after this, not in between
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
        receive(link)  # it is ready, or has gone: `render` will see
        return link

    def render(self, arguments: dict[str, Any]) -> str:
        """The text. Raises RequestError when the template fails on its arguments, or takes too
        long for them."""
        try:
            message = _encode(arguments)
        except RecursionError:
            raise _failed("cannot take them: they are nested too deeply") from None
        answer = self._ask(message) or self._ask(message)  # it may have died of something else
        if not answer:
            raise _failed("broke down on them")
        text = answer[1:].decode()
        if answer[:1] == b"!":
            raise _failed(f"fails on them: {text}")
        return text

    def _ask(self, message: bytes) -> bytes:
        """The answer; empty when the process went away over it, or has before."""
        try:
            link = self.start()
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
        """End it for good; from any thread, even while it renders."""
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
