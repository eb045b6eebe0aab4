"""How a child process of the launcher starts, and how it makes sure to die with the launcher.

There are two ways, because neither is enough. The kernel's parent-death signal also ends a process
that is stuck in a CUDA call. The death pipe, whose write end only the launcher has open, ends a
process whose parent died before the process could ask for that signal.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import ServeConfig
from .errors import StartError
from .fingerprint import check_unchanged
from .log import child_stderr, setup_logging
from .messages import Hello
from .transport import Sender, launcher_address

_PR_SET_PDEATHSIG = 1
_MAX_REPORT = 1 << 20  # bytes
STACKS_SIGNAL = signal.SIGQUIT  # makes a process write the stacks of its threads to its report
CONFIG_FILE = "config.json"  # in the runtime directory; written by the launcher


@dataclass(frozen=True)
class Child:
    """The arguments that a frontend, scheduler or worker process starts with."""

    role: str
    index: int
    epoch: int
    runtime_dir: str
    listen_fd: int | None  # frontend: the bound, not yet listening HTTP socket
    config: ServeConfig
    launcher: Sender
    metrics_fd: int | None = None  # frontend: as listen_fd, for --metrics_port
    usage_fd: int | None = None  # frontend: a file in memory that all of them share
    certificate_fd: int | None = None  # frontend: the same, with the last good certificate

    def hello(self) -> Hello:
        """The first message to every other process."""
        return Hello(self.role, self.index, os.getpid(), self.config.config_hash())


def start_child(role: str, argv: Sequence[str] | None = None) -> Child:
    """The first call in `python -m glimmer.<process>`. Makes this process die with its parent,
    reads the configuration, sets up logging, connects to the launcher and sends Hello. Raises
    ModelError if the model's files changed since the launcher started."""
    args = _parser(role).parse_args(argv)
    if args.parent_pid is not None:
        die_with_parent(args.parent_pid, args.death_fd)
    if args.report_fd is not None:
        faulthandler.enable(args.report_fd)
        faulthandler.register(STACKS_SIGNAL, args.report_fd)
    config = ServeConfig.load(Path(args.runtime_dir) / CONFIG_FILE)
    setup_logging(f"{role}-{args.index}", config.log_level, config.log_format)
    check_unchanged(config)
    launcher = Sender.connect(launcher_address(args.runtime_dir))
    child = Child(
        role,
        args.index,
        args.epoch,
        args.runtime_dir,
        args.listen_fd,
        config,
        launcher,
        args.metrics_fd,
        args.usage_fd,
        args.certificate_fd,
    )
    launcher.send(child.hello())
    return child


def _parser(role: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"glimmer {role}")
    parser.add_argument("--runtime_dir", required=True, help="holds config.json and the sockets")
    parser.add_argument("--index", type=int, default=0, help="frontend number or TP rank")
    parser.add_argument(
        "--epoch", type=int, default=0, help="number of this incarnation of the worker group"
    )
    parser.add_argument("--parent_pid", type=int, help="die with this process")
    parser.add_argument("--death_fd", type=int, help="die when this inherited pipe closes")
    parser.add_argument("--report_fd", type=int, help="file for stacks and the reason of a failure")
    parser.add_argument("--metrics_fd", type=int, help="inherited bound socket for probes")
    parser.add_argument("--usage_fd", type=int, help="inherited file in memory about keys")
    parser.add_argument("--certificate_fd", type=int, help="inherited file in memory")
    parser.add_argument("--listen_fd", type=int, help="inherited bound socket")
    return parser


def run_child(main: Callable[[], int], argv: Sequence[str] | None = None) -> int:
    """Run `main` and return its exit code. If it raises, log the error and write it to the
    report for the launcher. A process's `__main__` calls `sys.exit(run_child(main))`."""
    with child_stderr() if argv is None else contextlib.nullcontext():
        try:
            return main()
        except StartError as error:
            logging.getLogger(__name__).error("%s", error)
            reason, code = str(error), error.exit_code
        except Exception as error:
            logging.getLogger(__name__).exception("this process cannot go on")
            reason, code = f"{type(error).__name__}: {error}", 1
    args, _ = _parser("process").parse_known_args(sys.argv[1:] if argv is None else argv)
    if args.report_fd is not None:
        os.write(args.report_fd, b"\0" + reason.encode("utf-8", "backslashreplace"))
    return code


def read_report(report_fd: int) -> tuple[str, str]:
    """The contents of a report: Python stacks, and the reason why it failed. Each may be
    empty. The report is a file in memory, so that it needs no disk."""
    data = os.pread(report_fd, _MAX_REPORT, 0).decode("utf-8", "replace")
    stacks, _, reason = data.partition("\0")
    return stacks, reason


def die_with_parent(parent_pid: int, death_fd: int | None) -> None:
    """SIGKILL this process when its parent `parent_pid` is gone, or when the pipe whose read end is
    `death_fd` closes. The parent must fork from a thread that lives as long as the parent: the
    kernel sends the signal when the forking *thread* dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # the parent died before prctl took effect
        os.kill(os.getpid(), signal.SIGKILL)
    if death_fd is not None:
        threading.Thread(target=_wait_for_death, args=(death_fd,), daemon=True).start()


def _wait_for_death(death_fd: int) -> None:
    while os.read(death_fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
