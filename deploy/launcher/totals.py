"""Adds up what the processes of one role count. Each HTTP process tells the sums of all.

The launcher keeps the sums because it outlives the processes: the counts of one that has died stay
in them. A scrape shows only sums that the launcher has, so they never go backwards.
"""

from ...shared.messages import Counts


class Totals:
    """The sums, and the last counts of each process by its number."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._last: dict[int, Counts] = {}

    def add(self, counts: Counts) -> None:
        """Take in what one process has counted so far."""
        if not self.values:
            self.values = [0.0] * len(counts.values)
        last = self._last.get(counts.index)
        before = last.values if last and last.pid == counts.pid else [0.0] * len(counts.values)
        changes = zip(self.values, counts.values, before, strict=True)
        self.values = [total + new - old for total, new, old in changes]
        self._last[counts.index] = counts

    def serial(self, index: int) -> int:
        """Of the last counts of a process; 0: none."""
        last = self._last.get(index)
        return last.serial if last else 0
