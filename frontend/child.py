"""A child process that answers one message at a time, and is killed when that takes too long.

For work that may hang, exhaust its memory or crash: chat templates and grammars. The process is
started with the first message, and again after it has ended.

Both directions of the socket between the two: 4 bytes of length, big-endian, then the message. The
first message is the child's setup, which it answers with "ready". Later ones are questions, each
with one answer.
"""

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable

from ..shared.lifecycle import die_with_parent

_START_S = 30.0  # for the process to start on a busy machine
_LENGTH = struct.Struct("!I")


class ChildDiedError(Exception):
    """The process has ended without an answer. `code` is as in `subprocess`: -n for signal n."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


class KillableChild:
    """`python -m module` with a setup. Used from one thread at a time, which may block; the process
    ends with the thread that started it."""

    def __init__(self, module: str, setup: bytes, limit_s: float) -> None:
        self._module, self._setup = module, setup
        self.limit_s = limit_s  # of one answer
        self.num_timeouts = 0  # messages that took longer, by the clock or of processor time
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    @property
    def process_id(self) -> int | None:
        """Of the running process."""
        return None if self._process is None else self._process.pid

    def start(self) -> socket.socket:
        """The socket to the process, which is started if it is not running. Raises OSError when it
        does not start, or after `close`."""
        if self._link is not None:
            return self._link
        with self._lock:  # `close` must not run in between
            if self._is_closed:
                raise OSError("closed")
            self._link, theirs = socket.socketpair()
            link = self._link
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", self._module, str(os.getpid())],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                )
        link.settimeout(_START_S)
        send(link, self._setup)
        receive(link)  # it is ready, or has died: then `ask` fails
        return link

    def ask(self, message: bytes) -> bytes:
        """The answer. Raises TimeoutError after the limit, ChildDiedError when the process has
        died. In both cases the next message starts a new process."""
        try:
            link = self._link or self.start()
            link.settimeout(self.limit_s)
            send(link, message)
            answer = receive(link)
        except TimeoutError:
            self.num_timeouts += 1
            self._end(kill=True)
            raise
        except OSError:
            answer = b""
        if not answer:
            code = self._end(kill=False)
            self.num_timeouts += code == -signal.SIGPROF  # its limit of processor time
            raise ChildDiedError(code)
        return answer

    def close(self) -> None:
        """End the process for good. May be called from any thread, even while it works."""
        self._is_closed = True
        self._end(kill=True)

    def _end(self, kill: bool) -> int:
        with self._lock:
            process, link = self._process, self._link
            self._process, self._link = None, None
        if link is not None:
            link.close()
        if process is None:
            return 0
        if kill:
            process.kill()
        return process.wait()


# --- in the child ---


def serve(make: Callable[[bytes], Callable[[bytes], bytes]]) -> int:
    """Answer until the other side closes: `make` gets the setup and returns what answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    die_with_parent(int(sys.argv[1]), None)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=0) as link:
        answer = make(receive(link))
        send(link, b"ready")
        while message := receive(link):
            send(link, answer(message))
    return 0


# --- messages between the two ---


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
