"""How much all HTTP processes together use of each key's limits.

A file in memory that the launcher made is mapped by all of them. It has a row for each user, with
the figures of each process side by side. A process writes its own figures only, so there is
nothing to lock, and one that is stopped or killed blocks no other. Its successor takes over its
place. To keep a limit strictly, a process writes its own figure first and then looks at the sum.
"""

import fcntl
import hashlib
import mmap
import os
from dataclasses import dataclass

_ROWS = 8192  # twice the keys of a file, for users who come and go with its changes
_FIGURES = 3


@dataclass
class Usage:
    """Figures of one user, in one or several processes."""

    requests: int = 0  # open
    queued_tokens: int = 0
    used_tokens: int = 0  # since the server started


class UsageTable:
    """The view of HTTP process `index` of `count`. `fd` is the file in memory."""

    def __init__(self, fd: int, index: int, count: int) -> None:
        self._fd, self._index, self._count = fd, index, count
        self._width = 1 + _FIGURES * count
        size = 8 * _ROWS * self._width
        os.ftruncate(fd, size)
        self._cells = memoryview(mmap.mmap(fd, size)).cast("q")
        for row in range(0, len(self._cells), self._width):
            if self._cells[row]:  # requests of the process that had this place have ended
                own = row + 1 + _FIGURES * index
                self._cells[own] = self._cells[own + 1] = 0

    def of(self, name: str) -> "SharedUsage | None":
        """The row of a user; None if there is no room for another one."""
        digest = hashlib.sha256(name.encode()).digest()
        mark = int.from_bytes(digest[:8], "little") >> 2 | 1  # never 0
        fcntl.lockf(self._fd, fcntl.LOCK_EX)  # two processes must not take a row for two users
        try:
            for step in range(_ROWS):
                row = (mark + step) % _ROWS * self._width
                if self._cells[row] in (0, mark):
                    self._cells[row] = mark
                    own = row + 1 + _FIGURES * self._index
                    end = row + self._width
                    starts = range(row + 1, end, _FIGURES)
                    return SharedUsage(self._cells, own, [s for s in starts if s != own])
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return None


class SharedUsage:
    """One user's row. `own` and `others` are where the figures of each process begin."""

    def __init__(self, cells: "memoryview[int]", own: int, others: list[int]) -> None:
        self._cells, self._own, self._others = cells, own, others

    @property
    def own(self) -> Usage:
        """The figures of this process, or of the one before it in its place."""
        return Usage(*self._cells[self._own : self._own + _FIGURES])

    def publish(self, usage: Usage) -> None:
        """Set the figures of this process."""
        cells, start = self._cells, self._own
        cells[start], cells[start + 1] = usage.requests, usage.queued_tokens
        cells[start + 2] = usage.used_tokens

    def others(self) -> Usage:
        """Sums over the other processes."""
        cells, starts = self._cells, self._others
        return Usage(
            sum(cells[start] for start in starts),
            sum(cells[start + 1] for start in starts),
            sum(cells[start + 2] for start in starts),
        )
