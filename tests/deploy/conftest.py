"""Servers made of fake children, run as real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

with contextlib.suppress(ImportError):  # a machine with a card may lack it
    import psutil

FAKES = Path(__file__).with_name("fakes")
WAIT_S = 30.0


class FakeServer:
    """`glimmer serve` with fake children. Its runtime directory is `runtime`, in /tmp because
    socket names must be short."""

    def __init__(self, runtime: Path, stderr: Path, words: tuple[str, ...]) -> None:
        self.runtime = runtime
        self._stderr = stderr
        self._log_start = 0
        with stderr.open("wb") as log:
            self.process = subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": str(FAKES), "XDG_RUNTIME_DIR": str(runtime.parent)},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """Everything since `forget_log`."""
        return self._stderr.read_text()[self._log_start :]

    def forget_log(self) -> None:
        self._log_start += len(self.log)

    def ready_line(self) -> str:
        """Waits for it; empty if the server ended instead."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def children(self, mark: str = "") -> "list[psutil.Process]":
        """Child processes whose command line has `mark`, such as "fake_worker"."""
        found = []
        for child in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if mark in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def await_log(self, *texts: str) -> str:
        """Until all `texts` are in the log. Returns it; fails if the server ends before."""
        give_up = WAIT_S / 0.02
        while not all(text in self.log for text in texts):
            give_up -= 1
            assert give_up > 0, f"not in the log: {texts}\n{self.log}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)
                assert all(text in self.log for text in texts), self.log
        return self.log

    def await_children(self, **counts: int) -> None:
        """Until there are so many fake processes of each role."""
        give_up = time.monotonic() + WAIT_S
        while any(len(self.children(f"fake_{role}")) != counts[role] for role in counts):
            assert time.monotonic() < give_up, self.log
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(WAIT_S)


@contextlib.contextmanager
def fake_servers(base: Path, model: Path) -> Iterator[Callable[..., FakeServer]]:
    """start(*flags, ...) -> FakeServer, ended at the end; `wrapper` is a command before it."""
    servers: list[FakeServer] = []

    def start(
        *flags: str,
        runtime: Path | None = None,
        port: int = 0,
        command: str = "serve",
        wrapper: tuple[str, ...] = (),
    ) -> FakeServer:
        number = len(servers)
        runtime = runtime or base / f"r{number}"
        usual = ("--model_dir", str(model), "--port", str(port), "--runtime_dir", str(runtime))
        glimmer = (sys.executable, "-m", "fake_glimmer", command)
        words = (*wrapper, *glimmer, *usual, *flags)
        server = FakeServer(runtime, base / f"stderr-{number}", words)
        servers.append(server)
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.signal(signal.SIGKILL)
        server.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()


@pytest.fixture
def serve(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Callable[..., FakeServer]]:
    """Starts fake servers that end with the test."""
    with fake_servers(tmp_path_factory.mktemp("s"), tiny_model) as start:
        yield start


@pytest.fixture(scope="module")
def lasting(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Callable[..., FakeServer]]:
    """Starts fake servers that end with the module."""
    with fake_servers(tmp_path_factory.mktemp("s"), tiny_model) as start:
        yield start
