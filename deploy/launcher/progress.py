"""Shows the progress of a start: a live display on a terminal, plain lines elsewhere."""

import contextlib
import logging
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn

logger = logging.getLogger(__name__)
_REPEAT_S = 5.0  # least time between two plain lines about the same stage
_BYTES = 1e9  # totals from here on are bytes; smaller ones take too short to show a rate


class StartDisplay:
    """One line per process that is starting. Use until `close`."""

    def __init__(self, stream: TextIO | None = None, as_log: bool = False) -> None:
        """`as_log`: plain lines are log lines."""
        self._stream = sys.stderr if stream is None else stream
        self._as_log = as_log
        self._shown: dict[str, tuple[str, float]] = {}  # process -> stage, time of the last line
        # process -> its stage, and the amount done and the time when the stage began
        self._current: dict[str, tuple[str, int, float]] = {}
        self._spent: dict[str, dict[str, float]] = {}  # process -> seconds of each finished stage
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        if self._stream.isatty() and not as_log:
            columns = (TimeElapsedColumn(), TextColumn("{task.description}"))
            console = Console(file=self._stream)
            self._live = Progress(*columns, console=console, transient=True)
            self._live.start()

    def update(self, process: str, stage: str, done: int = 0, total: int = 0) -> None:
        """`process` is at `stage` and has done `done` of `total` (0: unknown)."""
        self._enter(process, stage, done)
        count = self._count(process, done, total)
        if self._live is not None:
            if process not in self._tasks:
                self._tasks[process] = self._live.add_task(process)
            self._live.update(self._tasks[process], description=f"{process}: {stage}{count}")
            return
        now = time.monotonic()
        last_stage, shown = self._shown.get(process, ("", 0.0))
        finished = total and done >= total
        if stage != last_stage or finished or now - shown >= _REPEAT_S:
            self._shown[process] = stage, now
            if self._as_log:
                logger.info("%s: %s%s", process, stage, count)
                return
            with contextlib.suppress(OSError):  # stderr may be a file on a full disk
                self._stream.write(f"{process}: {stage}{count}\n")
                self._stream.flush()

    def spent(self, process: str) -> str:
        """Seconds of each finished stage, in order."""
        stages = self._spent.get(process, {}).items()
        return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages)

    def _enter(self, process: str, stage: str, done: int) -> None:
        now = time.monotonic()
        old, _, since = self._current.get(process, ("", 0, now))
        if old == stage:
            return
        if old:
            spent = self._spent.setdefault(process, {})
            spent[old] = spent.get(old, 0.0) + now - since
        self._current[process] = stage, done, now

    def _count(self, process: str, done: int, total: int) -> str:
        """Percent; for bytes also GB, and GB/s since the stage began."""
        if not total:
            return ""
        count = f" {100 * done // total}%"
        if total >= _BYTES:
            _, done_before, begun = self._current[process]
            rate = (done - done_before) / max(time.monotonic() - begun, 1e-3)
            count += f" ({done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e9:.1f} GB/s)"
        return count

    def close(self) -> None:
        """Remove the live display, so that log lines can follow."""
        if self._live is not None:
            self._live.stop()
