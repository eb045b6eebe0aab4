"""When lost processes are started again, and when that is given up.

A unit is what is restarted together: the engine (the scheduler and all workers), or one frontend.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from ...shared.config import ServeConfig
from ...shared.errors import ModelError, PortError
from ...shared.fingerprint import changed_files, describe_changes
from .supervise import Process

_MAX_ATTEMPTS = 3  # restarts in a row after which the engine or a frontend did not become ready
_BACKOFF_S = 0.5  # before the second restart within _MEMORY_S, then twice as long each time
_MAX_BACKOFF_S = 8.0
_MEMORY_S = 60.0
ENGINE = "engine"


class Restarts:
    """Restarts so far, and those that are due. A start is the (role, index) of a process."""

    def __init__(self, clock: Callable[[], float], config: ServeConfig) -> None:
        """`clock` gives monotonic seconds."""
        self._clock, self._config = clock, config
        self.counts: Counter[str] = Counter()  # all of them: "engine" or "frontend"
        self._attempts: Counter[str] = Counter()  # by unit, since it was last ready
        self._recent: dict[str, list[float]] = {}  # by unit: times of its last restarts
        self._due: dict[tuple[str, int], float] = {}  # start -> when

    def lost(self, process: Process, starts: Iterable[tuple[str, int]]) -> str:
        """Schedule `starts`: at once the first time, later after repeated losses. Returns why not,
        after `_MAX_ATTEMPTS` restarts in a row that did not make the unit ready, and at once if the
        model changed on disk; otherwise "". A
        runtime directory that is full is no reason to give up: it has room again some day."""
        is_bad_model = process.returncode == ModelError.exit_code
        if is_bad_model and (changed := changed_files(self._config)):
            return describe_changes(changed)
        unit = unit_of(process)
        attempts = self._attempts[unit]
        is_broken = process.returncode != PortError.exit_code
        if is_broken and attempts >= _MAX_ATTEMPTS:
            return f"{attempts} restarts of the {unit} in a row did not help; last: {process.name}"
        self._attempts[unit] += is_broken
        self.counts["frontend" if process.role == "frontend" else ENGINE] += 1
        self.schedule(unit, starts)
        return ""

    def schedule(self, unit: str, starts: Iterable[tuple[str, int]]) -> None:
        """Start these after a time that grows with the number of recent restarts of the unit."""
        now = self._clock()
        recent = [at for at in self._recent.get(unit, []) if now - at < _MEMORY_S]
        delay = min(_MAX_BACKOFF_S, _BACKOFF_S * (2 ** min(len(recent), 10) - 1))
        self._recent[unit] = [*recent, now]
        self._due |= dict.fromkeys(starts, now + delay)

    def cancel(self, starts: Iterable[tuple[str, int]]) -> None:
        """These are not to be started any more."""
        for start in starts:
            self._due.pop(start, None)

    def helped(self, process: Process) -> None:
        """The unit of this process is ready: later losses count from 0."""
        del self._attempts[unit_of(process)]

    def wait_s(self, longest: float) -> float:
        """Seconds until the next start is due, at most `longest`."""
        now = self._clock()
        return max(0.0, min([longest, *(at - now for at in self._due.values())]))

    def take_due(self, now: float) -> list[tuple[str, int]]:
        """Starts that are due. They are not scheduled any more."""
        due = [start for start, at in self._due.items() if at <= now]
        self.cancel(due)
        return due


def unit_of(process: Process) -> str:
    """The unit that a process belongs to."""
    return process.name if process.role == "frontend" else ENGINE
