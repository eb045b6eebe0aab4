"""Reads files again when they have changed: keys, and the certificate.

A file may be written in place, so a change counts when the file has stayed the same for a second.
SIGHUP reads at once. If the new contents cannot be used, the old ones stay in use.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence

from ...shared.errors import ConfigError

_PERIOD_S = 1.0
logger = logging.getLogger(__name__)

Look = tuple[tuple[int, int, int] | None, ...]


class Reloader:
    """Calls `load` for the first time when it is made, and again when one of `paths` changes.
    `load` raises ConfigError, and changes nothing, if it cannot use the files. `name` is for log
    lines."""

    def __init__(self, name: str, paths: Sequence[str], load: Callable[[], None]) -> None:
        self._name, self._paths, self._load = name, paths, load
        self._loaded = self._latest = self._look()
        load()

    def check(self, at_once: bool = False) -> str:
        """Load again if the files have changed since the last time, and not since the last check;
        in any case if `at_once`. Returns why the old contents stay in use; "" if they do not."""
        before, self._latest = self._latest, self._look()
        is_at_rest = self._latest == before and self._latest != self._loaded
        if not at_once and not is_at_rest:
            return ""
        self._loaded = self._latest
        try:
            self._load()
        except ConfigError as error:
            problem = f"the old {self._name} stay in use: {error}"
            logger.error("%s", problem)
            return problem
        logger.info("read the %s again", self._name)
        return ""

    def _look(self) -> Look:
        """Time, size and number of each file; None for one that cannot be seen."""
        return tuple(map(_look, self._paths))


def _look(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


async def keep_current(
    reloaders: Iterable[Reloader], asked: asyncio.Event, answer: Callable[[str], None]
) -> None:
    """Check until cancelled: regularly, and at once when `asked` is set. `answer` is then called
    with the problems. A disk that hangs blocks a thread and nothing else."""
    reloaders = list(reloaders)
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asked.wait(), _PERIOD_S)
        at_once = asked.is_set()
        asked.clear()
        problems = [await asyncio.to_thread(reloader.check, at_once) for reloader in reloaders]
        if at_once:
            answer("; ".join(filter(None, problems)))
