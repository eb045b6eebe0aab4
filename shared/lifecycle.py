"""How a process starts as somebody's child, and how it makes sure to die with its parent.

Two independent ways, because each has a hole: the kernel's parent-death signal reaches a process
that is stuck in a CUDA call, and the death pipe (its write end is open in the launcher alone)
tells a process that was re-parented before it could ask for the signal.
"""

import argparse
import ctypes
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import ServeConfig
from .log import setup_logging
from .messages import Hello
from .transport import Sender, launcher_address

_PR_SET_PDEATHSIG = 1
CONFIG_FILE = "config.json"  # in the runtime directory; written by the launcher


@dataclass(frozen=True)
class Child:
    """What a frontend, scheduler or worker process knows when it starts."""

    role: str
    index: int
    epoch: int
    runtime_dir: str
    listen_fd: int | None  # frontend: the bound, not yet listening HTTP socket
    config: ServeConfig
    launcher: Sender

    def hello(self) -> Hello:
        """The first message to every peer."""
        return Hello(self.role, self.index, os.getpid(), self.config.config_hash())


def start_child(role: str, argv: Sequence[str] | None = None) -> Child:
    """First call in `python -m glimmer.<process>`: tie this process to its parent, read the
    settled configuration, set up logging, connect to the launcher and greet it."""
    parser = argparse.ArgumentParser(prog=f"glimmer {role}")
    parser.add_argument("--runtime_dir", required=True, help="holds config.json and the sockets")
    parser.add_argument("--index", type=int, default=0, help="frontend number or TP rank")
    parser.add_argument("--epoch", type=int, default=0, help="incarnation of the worker group")
    parser.add_argument("--parent_pid", type=int, help="die with this process")
    parser.add_argument("--death_fd", type=int, help="die when this inherited pipe closes")
    parser.add_argument("--listen_fd", type=int, help="inherited bound socket")
    args = parser.parse_args(argv)
    if args.parent_pid is not None:
        die_with_parent(args.parent_pid, args.death_fd)
    config = ServeConfig.load(Path(args.runtime_dir) / CONFIG_FILE)
    setup_logging(f"{role}-{args.index}", config.log_level)
    launcher = Sender.connect(launcher_address(args.runtime_dir))
    child = Child(role, args.index, args.epoch, args.runtime_dir, args.listen_fd, config, launcher)
    launcher.send(child.hello())
    return child


def die_with_parent(parent_pid: int, death_fd: int | None) -> None:
    """SIGKILL this process once its parent `parent_pid` is gone, or once the pipe behind
    `death_fd` (an inherited read end) reaches its end. The parent must have forked from a thread
    that lives as long as it does: the kernel signals at the death of the forking *thread*."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before prctl took effect
        os.kill(os.getpid(), signal.SIGKILL)
    if death_fd is not None:
        threading.Thread(target=_wait_for_death, args=(death_fd,), daemon=True).start()


def _wait_for_death(death_fd: int) -> None:
    while os.read(death_fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
