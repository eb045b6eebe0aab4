import errno
import io

import pytest
from glimmer.deploy.launcher.progress import StartDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_plain_lines_tell_each_stage_once_and_its_end() -> None:
    out = io.StringIO()
    display = StartDisplay(out)
    for done in range(5):
        display.update("worker 0", "loading weights", done, 4)
    display.update("worker 1", "loading weights", 0, 4)
    display.update("worker 0", "measuring memory")
    display.close()
    assert out.getvalue().splitlines() == [
        "worker 0: loading weights 0%",
        "worker 0: loading weights 100%",
        "worker 1: loading weights 0%",
        "worker 0: measuring memory",
    ]


def test_large_totals_are_bytes_with_their_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    out = io.StringIO()
    display = StartDisplay(out)
    display.update("worker 0", "meeting ranks")
    now += 50
    for done in (0, 12_000_000_000, 59_900_000_000):
        display.update("worker 0", "loading weights", done, 59_900_000_000)
        now += 6
    assert out.getvalue().splitlines()[1:] == [
        "worker 0: loading weights 0% (0.0 of 59.9 GB, 0.0 GB/s)",
        "worker 0: loading weights 20% (12.0 of 59.9 GB, 2.0 GB/s)",
        "worker 0: loading weights 100% (59.9 of 59.9 GB, 5.0 GB/s)",
    ]


def test_seconds_by_stage_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    display = StartDisplay(io.StringIO())
    assert display.spent("worker 0") == ""
    for stage, seconds in (("starting", 1.5), ("loading", 2.0), ("loading", 2.25), ("ready", 9)):
        display.update("worker 0", stage)
        display.update("worker 1", "starting")
        now += seconds
    assert display.spent("worker 0") == "starting 1.5 s, loading 4.2 s"
    assert display.spent("worker 1") == ""


def test_a_full_disk_does_not_end_the_start() -> None:
    display = StartDisplay(Full())
    display.update("worker 0", "loading weights", 1, 4)
    display.close()


def test_a_terminal_gets_a_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    display = StartDisplay(out)
    display.update("worker 0", "loading weights", 1, 4)
    display.update("worker 0", "loading weights", 2, 4)
    display.close()
    assert "worker 0: loading weights 50%" in out.getvalue()
