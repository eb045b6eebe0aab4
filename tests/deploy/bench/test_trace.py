"""Kernel times and idle time from profiler events."""

from types import SimpleNamespace
from typing import Any

import pytest
from glimmer.deploy.bench.trace import Trace, summarise


def event(name: str, begin: float, end: float, device: str = "DeviceType.CUDA") -> Any:
    span = SimpleNamespace(start=begin, end=end)
    return SimpleNamespace(name=name, device_type=device, time_range=span)


def test_overlaps_count_once_and_the_host_not_at_all() -> None:
    trace = Trace()
    events = [
        event("gemm", 10, 20),
        event("gemm", 15, 30),  # another stream
        event("norm", 40, 50),
        event("launch", 0, 100, "DeviceType.CPU"),
    ]
    summarise(trace, events)
    assert trace.kernels == {"gemm": (2, 25), "norm": (1, 10)}
    assert (trace.span_us, trace.busy_us) == (40, 30)
    assert trace.idle_share == pytest.approx(0.25)


def test_nothing_ran() -> None:
    trace = Trace()
    summarise(trace, [])
    assert trace.idle_share == 0.0
