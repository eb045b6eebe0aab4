"""The launcher's child processes: starts each one, notices its end, and kills it if necessary.

`supervisor.py` decides what the end of one process means for the others.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ...shared import errors
from ...shared.config import child_environment
from ...shared.errors import StartError
from ...shared.lifecycle import STACKS_SIGNAL, read_report
from ...shared.log import output_fd
from ...shared.transport import Sender, frontend_address, scheduler_address, worker_address
from .runtime_dir import RuntimeDir

logger = logging.getLogger(__name__)
_EXIT_WAIT_S = 10.0
_LAST_WORDS_S = 1.0  # a worker that reported a failure exits within this time, or is killed
_STACKS_WAIT_S = 0.5  # for all processes together to write their stacks
_MAX_STACKS = 20_000  # characters of one process in the log
_MAX_JANITORS = 10  # after so many deaths the janitor is given up


@dataclass(frozen=True)
class Modules:
    """The module that `python -m` runs for each role."""

    scheduler: str = "glimmer.scheduler"
    worker: str = "glimmer.workers"
    frontend: str = "glimmer.frontend"


@dataclass(eq=False)
class Process:
    """One child. `epoch` is the incarnation of the engine that it was started for."""

    role: str
    index: int
    epoch: int
    popen: subprocess.Popen[bytes]
    sender: Sender  # to this process alone: its unread messages are dropped when it dies
    sentinel: int | None  # pidfd, readable once the process has ended; None on old kernels
    report_fd: int  # file in memory with its stacks and the reason of its failure
    greeted: bool = False  # by its Hello: it handles the signal for stacks
    ready: bool = False
    stage: str = "starting"
    started: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)  # when it last sent anything

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.popen.pid

    @property
    def returncode(self) -> int:
        """Its exit code, once it has ended; negative: the signal that ended it."""
        return self.popen.returncode

    @property
    def name(self) -> str:
        """For logs, such as "worker 0"."""
        return f"{self.role} {self.index}"


@dataclass
class Children:
    """All live children. Only this process holds the write end of the death pipe."""

    runtime_dir: Path
    modules: Modules
    worker_threads: int
    listen_fd: int
    metrics_fd: int | None = None
    alive: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._death_read, self._death_write = os.pipe()
        # Files in memory that all HTTP processes share, and that outlive each of them.
        self._shared_fds = {
            f"{name}_fd": os.memfd_create(f"glimmer-{name}") for name in ("usage", "certificate")
        }

    def spawn(self, role: str, index: int, epoch: int) -> Process:
        """Start a process. Call from the main thread only: the kernel kills a child when the
        thread that forked it ends. Raises OSError if this machine cannot start one now."""
        sender = Sender.connect(_inbox(str(self.runtime_dir), role, index, epoch))
        report_fd = -1
        try:
            report_fd = os.memfd_create(f"glimmer-{role}-{index}")
            popen = self._popen(role, index, epoch, report_fd)
        except OSError:
            sender.close()
            if report_fd >= 0:
                os.close(report_fd)
            raise
        process = Process(role, index, epoch, popen, sender, sentinel_of(popen.pid), report_fd)
        self.alive.append(process)
        return process

    def _popen(
        self, role: str, index: int, epoch: int, report_fd: int
    ) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", getattr(self.modules, role)]
        command += ["--runtime_dir", str(self.runtime_dir), "--index", str(index)]
        command += ["--epoch", str(epoch), "--parent_pid", str(os.getpid())]
        command += ["--death_fd", str(self._death_read), "--report_fd", str(report_fd)]
        fds = [self._death_read, report_fd]
        if role == "frontend":
            command += ["--listen_fd", str(self.listen_fd)]
            fds.append(self.listen_fd)
            for name, fd in self._shared_fds.items():
                command += [f"--{name}", str(fd)]
                fds.append(fd)
            if self.metrics_fd is not None:
                command += ["--metrics_fd", str(self.metrics_fd)]
                fds.append(self.metrics_fd)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output_fd(),
            stderr=output_fd(),
            pass_fds=fds,
            start_new_session=True,  # Ctrl-C in the terminal must reach only the launcher
            env=child_environment(role, self.worker_threads),
        )

    def of(self, role: str) -> list[Process]:
        """Live children of one role."""
        return [process for process in self.alive if process.role == role]

    def find(self, role: str, index: int) -> Process | None:
        """The live child with this role and number."""
        return next((p for p in self.of(role) if p.index == index), None)

    def reap(self) -> list[tuple[Process, str]]:
        """Children that ended since the last call, each with the reason."""
        ended = [process for process in self.alive if process.popen.poll() is not None]
        return [(process, self._bury(process)) for process in ended]

    def let_exit(self, process: Process) -> None:
        """Wait a moment for a process that is about to end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(_LAST_WORDS_S)

    def kill(self, processes: list[Process]) -> None:
        """SIGKILL these and wait until they are gone."""
        for process in processes:
            process.popen.kill()
        for process in processes:
            try:
                process.popen.wait(_EXIT_WAIT_S)
            except subprocess.TimeoutExpired:  # stuck in the kernel, perhaps in a driver call
                logger.error("%s (pid %d) does not die", process.name, process.popen.pid)
            self._bury(process)

    def close(self) -> None:
        """Kill all children that are alive."""
        self.kill(list(self.alive))
        os.close(self._death_read)
        os.close(self._death_write)
        for fd in self._shared_fds.values():
            os.close(fd)

    def _bury(self, process: Process) -> str:
        self.alive.remove(process)
        process.sender.close()
        if process.sentinel is not None:
            os.close(process.sentinel)
        address = _inbox(str(self.runtime_dir), process.role, process.index, process.epoch)
        with contextlib.suppress(OSError):
            os.unlink(address.removeprefix("ipc://"))
        stacks, reason = read_report(process.report_fd)
        os.close(process.report_fd)
        if stacks and process.popen.returncode not in (0, -signal.SIGKILL):  # it crashed
            logger.error("%s:\n%s", process.name, stacks[-_MAX_STACKS:])
        return reason or describe_exit(process.popen.returncode)

    def log_stacks(self, occasion: str) -> None:
        """Log the Python stacks of all children, also of those that hang: a stopped one shows its
        state instead."""
        asked = {p: len(read_report(p.report_fd)[0]) for p in self.alive if p.greeted}
        for process in asked:
            process.popen.send_signal(STACKS_SIGNAL)
        deadline = time.monotonic() + _STACKS_WAIT_S
        silent = set(asked)
        while silent and time.monotonic() < deadline:
            time.sleep(0.05)  # also lets the last ones finish writing
            silent = {p for p in silent if len(read_report(p.report_fd)[0]) == asked[p]}
        for process, length in asked.items():
            text = read_report(process.report_fd)[0][length:][:_MAX_STACKS]
            text = text or f"  no answer; {_state_of(process.popen.pid)}"
            logger.error("%s: stacks of %s:\n%s", occasion, process.name, text.rstrip())


def _state_of(pid: int) -> str:
    """The kernel's view of a process that does not answer."""
    words = ["the process is gone"]
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        words = [line for line in status if line.startswith("State:")]
        words.append("waits in " + (Path(f"/proc/{pid}/wchan").read_text() or "user space"))
    return ", ".join(" ".join(word.split()) for word in words)


def _inbox(runtime_dir: str, role: str, index: int, epoch: int) -> str:
    if role == "frontend":
        return frontend_address(runtime_dir, index)
    if role == "scheduler":
        return scheduler_address(runtime_dir)
    return worker_address(runtime_dir, epoch, index)


class JanitorKeeper:
    """Keeps one janitor running, which waits for the end of this process (see `janitor.py`)."""

    def __init__(self, runtime: RuntimeDir) -> None:
        self.runtime = runtime
        self._read, self._write = os.pipe()
        self._count = 0
        self.sentinel: int | None = None
        self._spawn()

    def _spawn(self) -> None:
        self._count += 1
        command = [sys.executable, "-P", "-m", f"{__package__}.janitor"]
        command += ["--watch_fd", str(self._read), "--sweep_dir", str(self.runtime.path)]
        if self.runtime.created:
            command.append("--whole")
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[self._read],
            start_new_session=True,
        )
        self.sentinel = sentinel_of(self._popen.pid)

    def check(self) -> None:
        """Start another janitor if the last one died."""
        if self._popen.poll() is None or self._count > _MAX_JANITORS:
            return
        self._close_sentinel()
        if self._count == _MAX_JANITORS:
            logger.error("the janitor does not stay alive; files may be left after a SIGKILL")
            self._count += 1
        else:
            with contextlib.suppress(OSError):  # too many open files: at the next call
                self._spawn()

    def close(self) -> None:
        """Let the janitor end. It removes the runtime directory if that still exists."""
        os.close(self._write)
        try:
            self._popen.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._close_sentinel()
        os.close(self._read)

    def _close_sentinel(self) -> None:
        if self.sentinel is not None:
            os.close(self.sentinel)
            self.sentinel = None


def sentinel_of(pid: int) -> int | None:
    """A file descriptor that becomes readable when this child ends; None on old kernels."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def describe_exit(code: int | None) -> str:
    """A `Popen.returncode` in words."""
    if code is None:
        return "does not die"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def start_error(code: int | None, message: str) -> StartError:
    """The error of the tree whose exit code a child ended with."""
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, StartError) and kind.exit_code == code:
            return kind(message)
    return StartError(message)
