"""A plugin that prints the CPU seconds of the slowest tests and files, which depend less on what
else the machine does than wall time: `PYTHONPATH=tests pytest -p cpu_times`.

The time of processes that a test started counts when they have ended. So a server that several
tests share counts for the last of them.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator

import pytest

_SHOWN = 40
_seconds: Counter[str] = Counter()


def _used() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = _used()
    result = yield
    _seconds[item.nodeid] += _used() - before
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    files: Counter[str] = Counter()
    for test, seconds in _seconds.items():
        files[test.split("::")[0]] += seconds
    terminalreporter.section(f"CPU seconds, {sum(files.values()):.0f} in all")
    for table in (files, _seconds):
        for name, seconds in table.most_common(_SHOWN):
            terminalreporter.line(f"{seconds:7.1f}  {name}")
        terminalreporter.line("")
