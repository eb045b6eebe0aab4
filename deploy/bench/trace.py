"""What a GPU did during some steps, from the profiler: time by kernel, and how long it idled."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Trace:
    """Filled when the `with` of `traced` ends. Times in microseconds."""

    kernels: dict[str, tuple[int, float]] = field(default_factory=dict)  # name -> launches, time
    span_us: float = 0.0  # from the first kernel's begin to the last one's end
    busy_us: float = 0.0  # of it, with at least one kernel or copy running

    @property
    def idle_share(self) -> float:
        """Share of the span in which nothing ran."""
        return 1 - self.busy_us / self.span_us if self.span_us else 0.0


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """Profile what runs on the GPU inside the `with`, CUDA graphs included."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    found = Trace()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        yield found
        torch.cuda.synchronize()
    summarise(found, profiler.events())


def summarise(trace: Trace, events: Any) -> None:
    """Fill a trace from a profiler's events; those of the host do not count."""
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
