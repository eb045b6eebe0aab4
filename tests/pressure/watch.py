"""Watches a server from outside while a load runs, and makes one row of the table of it."""

import contextlib
import json
import math
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from pressure.flood import floor_server
from server import RunningServer, free_port, wait_until

_PERIOD_S = 0.5
_IDLE_S = 60.0  # for a server to have nothing to do, after a load
COLUMNS = (
    "part",
    "n",
    "hung clients",
    "leaked pages",
    "longest loop block ms",
    "probe p99 ms",
    "probe p99 ms, own port",
    "RSS growth MB",
    "notes",
)


@dataclass
class Row:
    """One line of the table. NaN: does not apply. `problems` make the part a failure."""

    part: str
    n: int = 0
    hung: int = 0
    leaked_pages: float = math.nan
    block_ms: float = math.nan  # the longest probe of the main port: no block was longer
    probe_ms: float = math.nan
    own_port_ms: float = math.nan
    rss_mb: float = math.nan  # of the process that grew most, at its peak
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """The row as text, in the order of COLUMNS."""
        values = (self.leaked_pages, self.block_ms, self.probe_ms, self.own_port_ms, self.rss_mb)
        numbers = ["" if math.isnan(value) else f"{value:.1f}" for value in values]
        problems = [f"**{problem}**" for problem in self.problems]
        text = "; ".join([*problems, *self.notes]).replace("|", "/").replace("\n", " ")
        return [self.part, str(self.n), str(self.hung), *numbers, text]


def table(rows: list[Row]) -> str:
    """A table in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


class Probe:
    """A process that measures the replies of one path."""

    def __init__(self, port: int, path: str = "/liveness") -> None:
        script = Path(__file__).with_name("probe.py")
        command = [sys.executable, "-S", str(script), str(port), path]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def end(self) -> tuple[list[float], int]:
        """All times in ms, sorted, and the number of failures."""
        try:
            text, _ = self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        result = json.loads(text)
        return sorted(1e3 * seconds for seconds in result["times"]), result["failures"]


def quantile(times: list[float], share: float) -> float:
    """A quantile of sorted values; NaN if there are none."""
    return times[min(len(times) - 1, int(len(times) * share))] if times else math.nan


class MemoryWatch(threading.Thread):
    """Samples the memory of all processes of a server until `end`."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._ended = threading.Event()
        self.samples: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)

    def run(self) -> None:
        """Append (time, MB) for each (name, process id)."""
        while True:
            pids = {**self._server.processes(), "launcher": self._server.launcher.pid}
            for name, pid in pids.items():
                with contextlib.suppress(psutil.Error):
                    mb = psutil.Process(pid).memory_info().rss / 2**20
                    self.samples[name, pid].append((time.monotonic(), mb))
            if self._ended.wait(_PERIOD_S):
                return

    def end(self) -> None:
        """Stop."""
        self._ended.set()
        self.join()

    def growth(self) -> tuple[float, str]:
        """MB by which the process that grew most was above its first sample, and its name."""
        growth = {
            name: max(mb for _, mb in values) - values[0][1]
            for (name, _), values in self.samples.items()
        }
        name = max(growth, key=lambda name: growth[name])
        return growth[name], name


def leaked_pages(server: RunningServer, row: Row) -> float:
    """KV pages in use while nothing runs. Waits until nothing runs."""

    def is_idle() -> bool:
        names = ("lightllm_num_running_reqs", "lightllm_queue_size", "lightllm_batch_pause_size")
        return all(server.metric(name) == 0 for name in names)

    try:
        wait_until(is_idle, _IDLE_S, "nothing runs or waits")
        time.sleep(1.2)  # the next heartbeat
    except AssertionError as error:
        row.problems.append(str(error))
    names = ("glimmer_pages", "glimmer_pages_free", "glimmer_pages_cached")
    total, free, cached = map(server.metric, names)
    return total - free - cached


@contextlib.contextmanager
def watched(server: RunningServer, own_port: int, row: Row) -> Iterator[None]:
    """Watch `server`, whose --metrics_port is `own_port`, and write the figures to `row`."""
    memory = MemoryWatch(server)
    memory.start()
    with floor_server() as floor:
        probes = Probe(server.port), Probe(own_port), Probe(floor)
        time.sleep(1)
        try:
            yield
        finally:
            (main, failures), (own, own_failures), (machine, _) = [probe.end() for probe in probes]
    memory.end()
    row.block_ms, row.probe_ms = quantile(main, 1), quantile(main, 0.99)
    row.own_port_ms = quantile(own, 0.99)
    row.rss_mb, name = memory.growth()
    row.notes.append(f"most growth: {name}")
    row.notes.append(
        f"{len(main)} probes, {failures} and {own_failures} failed; a server that does nothing "
        f"beside it: p99 {quantile(machine, 0.99):.1f}, longest {quantile(machine, 1):.1f} ms"
    )
    row.leaked_pages = leaked_pages(server, row)
    if row.leaked_pages:
        row.problems.append("pages leaked")


def metrics_flags() -> tuple[int, tuple[str, str]]:
    """A free port for probes, and the flags that make a server use it."""
    port = free_port()
    return port, ("--metrics_port", str(port))
