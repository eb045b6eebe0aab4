"""Runs commands as a container engine would: with another root directory, other users, namespaces
of their own, and no rights. Uses bubblewrap, and needs root.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

BWRAP = shutil.which("bwrap")
MISSING = "" if BWRAP and os.geteuid() == 0 else "needs root and bubblewrap: make tools"
_NO_RIGHTS = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--clear-groups"]


@dataclass
class Sandbox:
    """A root directory, or / for this machine's files. `binds` are paths of this machine and where
    they appear, also below a directory that others must not enter."""

    root: Path
    binds: Mapping[Path, Path] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, script: str, directory: str = "/") -> None:
        """Run a shell script as root, which may change the tree and use the network."""
        words = [*self._base("--bind"), "--cap-add", "ALL", "--chdir", directory]
        words += ["--perms", "1777", "--tmpfs", "/tmp", *self._shown()]
        words += ["/bin/sh", "-ec", script]
        subprocess.run(words, check=True, env={}, stdin=subprocess.DEVNULL)

    def start(self, command: Sequence[str], user: int, writable: Mapping[str, int]) -> "Container":
        """Start `command` as process 1, as `user` without rights, on a read-only tree without a
        network. `writable` are directories in memory, with their sizes in bytes."""
        words = [*self._base("--ro-bind"), "--unshare-net", "--unshare-ipc", "--unshare-uts"]
        words += ["--as-pid-1", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        words += ["--cap-add", "CAP_SETPCAP"]
        for path, size in writable.items():
            words += ["--perms", "1777", "--size", str(size), "--tmpfs", path]
        words += [*self._shown(), "--remount-ro", "/"]
        words += ["--", "setpriv", f"--reuid={user}", f"--regid={user}", *_NO_RIGHTS]
        process = subprocess.Popen([*words, *command], env={}, stdin=subprocess.DEVNULL)
        return Container(process, user, self.environment)

    def _base(self, root: str) -> list[str]:
        assert BWRAP is not None
        words = [BWRAP, "--die-with-parent", "--unshare-pid"]
        if self.root == Path("/"):  # directories for mounts are made in a root of its own
            for path in sorted(Path("/").iterdir()):
                if path.is_symlink():
                    words += ["--symlink", str(path.readlink()), str(path)]
                elif path.is_dir() and path.name not in ("dev", "proc", "root", "run", "tmp"):
                    words += ["--ro-bind", str(path), str(path)]
        else:
            words += [root, str(self.root), "/"]
        words += ["--proc", "/proc", "--dev", "/dev"]
        for name, value in self.environment.items():
            words += ["--setenv", name, value]
        return words

    def _shown(self) -> list[str]:
        words = []
        for path, place in self.binds.items():
            for parent in reversed(place.parents[:-1]):
                words += ["--perms", "0755", "--dir", str(parent)]
            words += ["--ro-bind", str(path), str(place)]
        return words


@dataclass
class Container:
    """A started command. `process` is bubblewrap, whose child is process 1 of the container."""

    process: "subprocess.Popen[bytes]"
    user: int
    environment: dict[str, str]

    @property
    def first(self) -> psutil.Process:
        """Process 1."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def enter(self, *command: str, timeout_s: float = 120.0) -> "subprocess.CompletedProcess[str]":
        """Run a command in the container, as its user."""
        words = ["nsenter", f"--target={self.first.pid}", "--mount", "--net", "--pid", "--ipc"]
        words += ["--root", "--wd=/", "setpriv", f"--reuid={self.user}", f"--regid={self.user}"]
        return subprocess.run(
            [*words, *_NO_RIGHTS, *command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )

    def wait_until(self, *command: str, timeout_s: float) -> float:
        """Seconds until the command succeeds in the container. Raises TimeoutError if the container
        ends before or the time is over."""
        begin = time.monotonic()
        while time.monotonic() - begin < timeout_s and self.process.poll() is None:
            with contextlib.suppress(ValueError, psutil.NoSuchProcess):
                if self.enter(*command).returncode == 0:
                    return time.monotonic() - begin
            time.sleep(0.2)
        raise TimeoutError(f"{' '.join(command)}: no success, exit {self.process.poll()}")

    def stop(self, timeout_s: float) -> int:
        """SIGTERM to process 1, as at the end of a pod. Returns its exit code."""
        self.first.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End whatever still runs."""
        self.process.kill()
        self.process.wait()
