"""Log lines, each with the name of its process. They go to stderr only.

No process waits for stderr. The launcher and its children write to one pipe that takes a line at
once or not at all, and a thread of the launcher copies the pipe to stderr. Lines are dropped and
counted while stderr is not read, or its disk is full.
"""

import contextlib
import io
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from .log_format import JsonFormatter, make_formatter

_CHUNK = 4096  # bytes that a pipe takes whole or not at all (PIPE_BUF)
_WHY = "stderr was not read, or its disk was full"
_FLUSH_S = 1.0  # a process that ends waits so long for stderr to take its last lines


def setup_logging(process: str, level: str, form: str = "text") -> None:
    """Configure the root logger of this process. `process` is a name such as "worker-0", `form` one
    of `log_format.FORMS`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(process, form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.raiseExceptions = False  # a full disk or closed stderr must not reach a request


def _notice(text: str) -> str:
    """A line about this module, in the form of the others."""
    level = logging.WARNING
    record = logging.LogRecord(__name__, level, __file__, 0, text, None, None)
    handlers = logging.getLogger().handlers
    formatter = handlers[0].formatter if handlers else None
    return (formatter or logging.Formatter("%(levelname)s %(message)s")).format(record) + "\n"


def report_error(text: str) -> None:
    """Write an error of a command to stderr: the text alone, or a line of JSON if the log is."""
    handlers = logging.getLogger().handlers
    if handlers and isinstance(handlers[0].formatter, JsonFormatter):
        logging.getLogger(__name__).error("%s", text)
    else:
        print(text, file=sys.stderr)


class LossyText(io.TextIOBase):
    """A text stream over the non-blocking pipe `fd`. Drops lines that the pipe does not take at
    once, counts them in `dropped`, and says so when it takes lines again. Thread-safe."""

    def __init__(self, fd: int, is_terminal: bool = False) -> None:
        self._fd = fd
        self._is_terminal = is_terminal
        self._lock = threading.RLock()  # a signal handler may write during a write
        self._unreported = 0
        self.dropped = 0
        self.is_broken = False  # the pipe's reader cannot write: a report would be lost, too

    def write(self, text: str) -> int:
        """Write or drop `text`. Never raises and never waits."""
        with self._lock:
            self.report()
            if not self._put(text):
                self.lose(max(1, text.count("\n")))
        return len(text)

    def report(self) -> None:
        """Write how many lines were dropped since the last report, unless that would be lost."""
        with self._lock:
            count = self._unreported
            if not count or self.is_broken:
                return
            text = f"process {os.getpid()}: {count} log lines were dropped: {_WHY}"
            if self._put(_notice(text)):
                self._unreported -= count

    def report_last(self) -> None:
        """Report before this process ends, even if the pipe is full at this moment."""
        deadline = time.monotonic() + _FLUSH_S
        while self._unreported and time.monotonic() < deadline:
            self.report()
            time.sleep(0.01)

    def lose(self, num_lines: int) -> None:
        """Count lines that were dropped."""
        with self._lock:
            self.dropped += num_lines
            self._unreported += num_lines

    def _put(self, text: str) -> bool:
        data = text.encode("utf-8", "backslashreplace")
        try:
            for begin in range(0, len(data), _CHUNK):
                os.write(self._fd, data[begin : begin + _CHUNK])
        except OSError:  # full, or the reader is gone
            return False
        return True

    def writable(self) -> bool:
        """True."""
        return True

    def isatty(self) -> bool:
        """Whether lines end up on a terminal."""
        return self._is_terminal

    def fileno(self) -> int:
        """The pipe's file descriptor, for child processes."""
        return self._fd

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """UTF-8."""
        return "utf-8"


def output_fd() -> int | None:
    """The file descriptor for the output of child processes. None: that of this process."""
    stream: Any = sys.stderr
    return stream.fileno() if isinstance(stream, LossyText) else None


def dropped_lines() -> int:
    """Number of lines that this process dropped. Reports them if stderr is read again."""
    stream: Any = sys.stderr
    if not isinstance(stream, LossyText):
        return 0
    stream.report()
    return stream.dropped


@contextlib.contextmanager
def lossy_stderr() -> Iterator[None]:
    """Replace `sys.stderr` by a LossyText, which child processes may inherit, and copy it to file
    descriptor 2. At the end, lines that are on their way have a moment to arrive."""
    if sys.stderr is not sys.__stderr__ or sys.stderr is None:  # redirected within Python
        yield
        return
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    previous, stream = sys.stderr, LossyText(write_fd, os.isatty(2))
    copier = threading.Thread(target=_copy, args=(read_fd, stream), daemon=True)
    copier.start()
    sys.stderr = stream
    try:
        yield
    finally:
        stream.report_last()
        sys.stderr = previous
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                handler.setStream(previous)
        os.close(write_fd)
        copier.join(_FLUSH_S)


@contextlib.contextmanager
def child_stderr() -> Iterator[None]:
    """The same for a child process. The launcher gave it the pipe as its stdout and stderr; a
    process that was started without a launcher makes its own."""
    if os.get_blocking(2):
        with lossy_stderr():
            yield
        return
    sys.stdout = sys.stderr = LossyText(2)
    yield


def write_aside(fd: int, text: str) -> None:
    """Write to a file that may never take it: wait for that a moment only."""

    def write() -> None:
        with contextlib.suppress(OSError):  # closed or full
            os.write(fd, text.encode())

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(_FLUSH_S)


def _copy(read_fd: int, stream: LossyText) -> None:
    """Copy the pipe to stderr until all writers are gone. Only this thread ever waits for it."""
    with contextlib.suppress(OSError):
        while data := os.read(read_fd, 1 << 16):
            stream.is_broken = not _copy_out(data)
            if stream.is_broken:
                stream.lose(data.count(b"\n"))
    os.close(read_fd)


def _copy_out(data: bytes) -> bool:
    while data:
        try:
            data = data[os.write(2, data) :]
        except BlockingIOError:  # it was made non-blocking elsewhere
            select.select([], [2], [])
        except OSError:
            return False
    return True
