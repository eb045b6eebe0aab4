"""Profiles a GPU during some steps: time by kernel, and the share of time in which it idled."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Trace:
    """A profile, filled when the `with` of `traced` ends. Times in microseconds."""

    kernels: dict[str, tuple[int, float]] = field(default_factory=dict)  # name -> launches, time
    span_us: float = 0.0  # from the begin of the first kernel to the end of the last
    busy_us: float = 0.0  # time within the span in which a kernel or copy runs

    @property
    def idle_share(self) -> float:
        """Share of the span in which neither a kernel nor a copy runs."""
        return 1 - self.busy_us / self.span_us if self.span_us else 0.0


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """Profile the GPU inside the `with`, including CUDA graphs."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    trace = Trace()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        yield trace
        torch.cuda.synchronize()
    summarise(trace, profiler.events())


def summarise(trace: Trace, events: Any) -> None:
    """Fill a trace from a profiler's events. Events of the host are ignored."""
    spans = []
    for event in events:
        if "CUDA" not in str(event.device_type):
            continue
        begin, end = event.time_range.start, event.time_range.end
        spans.append((begin, end))
        launches, total = trace.kernels.get(event.name, (0, 0.0))
        trace.kernels[event.name] = (launches + 1, total + end - begin)
    if not spans:
        return
    spans.sort()
    reached = first = spans[0][0]
    for begin, end in spans:
        trace.busy_us += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    trace.span_us = reached - first
