"""A plugin that prints the CPU seconds of the slowest tests and files, which depend less on what
else the machine does than wall time: `PYTHONPATH=tests pytest -p cpu_times`.

The time of processes that a test started or used counts too, also of a server that several tests
share.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import psutil
import pytest

_SHOWN = 40
_seconds: dict[str, float] = defaultdict(float)


def _used() -> float:
    """By this process and all below it, those that have ended included."""
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = _used()
    result = yield
    _seconds[item.nodeid] += _used() - before
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    files: dict[str, float] = defaultdict(float)
    for test, seconds in _seconds.items():
        files[test.split("::")[0]] += seconds
    terminalreporter.section(f"CPU seconds, {sum(files.values()):.0f} in all")
    for table in (files, _seconds):
        slowest = sorted(table, key=table.__getitem__, reverse=True)[:_SHOWN]
        for name in slowest:
            terminalreporter.line(f"{table[name]:7.1f}  {name}")
        terminalreporter.line("")
