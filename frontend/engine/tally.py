"""Counters and histograms of one HTTP process, kept as one list of numbers.

All processes of a server lay the list out alike, so the launcher adds the lists up without knowing
what they mean (`deploy/launcher/totals.py`). Numbers only grow. Every label has a fixed set of
values, so no client can make a list longer.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric


@dataclass(frozen=True)
class _Counter:
    name: str
    text: str
    label: str  # "": none
    keys: dict[str, int]  # value of the label -> place in the list


@dataclass(frozen=True)
class _Histogram:
    name: str
    text: str
    bounds: Sequence[float]  # upper ones, without infinity
    start: int  # counts per bucket, one more than bounds; then the sum of all observed values


class Tally:
    """Define all metrics first. Not thread-safe: used by the event loop alone."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._counters: dict[str, _Counter] = {}
        self._histograms: dict[str, _Histogram] = {}
        self._followed: dict[str, Callable[[], float]] = {}

    def counter(self, name: str, text: str, label: str = "", keys: Sequence[str] = ("",)) -> None:
        """Define a counter, with one value for each of `keys`."""
        start = len(self.values)
        places = {key: start + n for n, key in enumerate(keys)}
        self._counters[name] = _Counter(name, text, label, places)
        self.values += [0.0] * len(keys)

    def follow(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Define a counter that is kept elsewhere. `read` returns its value. With text "" it is
        added up with the others but `collect` does not show it."""
        self.counter(name, text)
        self._followed[name] = read

    def refresh(self) -> None:
        """Read the counters that are kept elsewhere."""
        for name, read in self._followed.items():
            self.values[self._counters[name].keys[""]] = read()

    def histogram(self, name: str, text: str, bounds: Sequence[float]) -> None:
        """Define a histogram with these upper bounds of its buckets, in rising order."""
        self._histograms[name] = _Histogram(name, text, bounds, len(self.values))
        self.values += [0.0] * (len(bounds) + 2)

    def count(self, name: str, amount: float = 1.0, key: str = "") -> None:
        """Raise a counter. Raises KeyError for a key that was not defined."""
        self.values[self._counters[name].keys[key]] += amount

    def observe(self, name: str, value: float) -> None:
        """Add one value to a histogram."""
        histogram = self._histograms[name]
        self.values[histogram.start + bisect_left(histogram.bounds, value)] += 1
        self.values[histogram.start + len(histogram.bounds) + 1] += value

    def value(self, values: Sequence[float], name: str) -> float:
        """A counter without a label, in a list that is laid out as this one."""
        return values[self._counters[name].keys[""]]

    def collect(self, values: Sequence[float], labels: dict[str, str]) -> Iterator[Metric]:
        """The metrics of a list that is laid out as this one, with `labels` on each."""
        names, given = list(labels), list(labels.values())
        for counter in self._counters.values():
            if not counter.text:
                continue
            own = [counter.label] if counter.label else []
            family = CounterMetricFamily(counter.name, counter.text, labels=[*names, *own])
            for key, place in counter.keys.items():
                family.add_metric([*given, *([key] if own else [])], values[place])
            yield family
        for histogram in self._histograms.values():
            end = histogram.start + len(histogram.bounds) + 1
            buckets = cumulative(histogram.bounds, values[histogram.start : end])
            distribution = HistogramMetricFamily(histogram.name, histogram.text, labels=names)
            distribution.add_metric(given, buckets, values[end])
            yield distribution


def cumulative(bounds: Sequence[float], counts: Sequence[float]) -> list[tuple[str, float]]:
    """Counts per bucket -> Prometheus's cumulative ones, with the upper bounds as text. No counts
    at all are zeros."""
    counts = counts or [0] * (len(bounds) + 1)
    limits = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(limits, accumulate(map(float, counts)), strict=True))
