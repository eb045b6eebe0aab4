"""The private directory that holds one server's sockets and settled configuration.

A directory belongs to the live process that holds its lock file. The lock is taken first, because
binding an ipc socket succeeds silently on a path that is in use. Imports only the standard library
and shared.errors, because the janitor uses it.
"""

import contextlib
import fcntl
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...shared.errors import ConfigError, PortError

_LOCK = "lock"
_FILES = ("*.sock", "config.json", "failed-*", "ranks-*", "api-keys*", _LOCK)
_PREFIX = "glimmer-"
_LOCK_WAIT_S = 1.0  # the janitor of a server that just died may hold the lock
_KILL_WAIT_S = 10.0
_SOCKET_PATH_BYTES = 107  # limit of the kernel, without the terminating zero
_LONGEST_NAME = "/worker-999999-1023.sock"


@dataclass(frozen=True)
class RuntimeDir:
    """A locked runtime directory. The lock is released when this process ends."""

    path: Path
    created: bool  # by this process, which then removes it at the end instead of emptying it
    lock_fd: int

    def remove(self) -> None:
        """Remove all files of a server, and the directory if this process created it."""
        empty(self.path, self.created)
        os.close(self.lock_fd)


def claim_runtime_dir(path: Path | None, parent: Path) -> RuntimeDir:
    """Lock `path`. If it is None, remove directories of dead servers from `parent` and lock a new
    directory there.

    Raises PortError naming the process that holds the lock, and ConfigError for a directory that
    is not private to this user.
    """
    created = path is None or not path.exists()
    if path is None:
        clean_stale(parent)
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    path = path.absolute()
    if len(os.fsencode(path)) + len(_LONGEST_NAME) > _SOCKET_PATH_BYTES:
        raise ConfigError(f"--runtime_dir {path}: too long for socket names; use a shorter path")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--runtime_dir {path}: {error.strerror}") from error
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(f"--runtime_dir {path}: must be your own private directory (chmod 700)")
    lock_fd = try_lock(path, _LOCK_WAIT_S)
    if lock_fd is None:
        raise PortError(
            f"--runtime_dir {path} is in use by {describe(_lock_owner(path))}; "
            "stop that server or choose another directory"
        )
    kill_leftovers(path)
    empty(path, whole=False, keep=_LOCK)
    os.truncate(lock_fd, 0)
    os.write(lock_fd, str(os.getpid()).encode())
    return RuntimeDir(path, created, lock_fd)


def try_lock(path: Path, wait_s: float) -> int | None:
    """The open, locked lock file of a directory; None if another process holds it for longer than
    `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The lock file may have been removed between open and flock.
            if os.fstat(fd).st_ino == (path / _LOCK).stat().st_ino:
                return fd
        os.close(fd)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)


def clean_stale(parent: Path) -> None:
    """Remove this user's default runtime directories whose server has ended."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.geteuid():
                continue
            if not (path / _LOCK).exists():  # not a runtime directory, or still being created
                continue
            lock_fd = try_lock(path, 0.0)
            if lock_fd is not None:
                kill_leftovers(path)
                empty(path, whole=True)
                os.close(lock_fd)


def empty(path: Path, whole: bool, keep: str = "") -> None:
    """Remove a server's files but `keep`. With `whole`, also remove the directory if it is empty
    then."""
    for pattern in _FILES:
        for file in path.glob(pattern):
            if file.name != keep:
                file.unlink(missing_ok=True)
    if whole:
        with contextlib.suppress(OSError):
            path.rmdir()


def kill_leftovers(path: Path) -> None:
    """SIGKILL processes that a dead launcher started for this directory, and wait for their
    end."""
    deadline = time.monotonic() + _KILL_WAIT_S
    while (pids := list(_children_of(path))) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _children_of(path: Path) -> Iterator[int]:
    """Children are recognised by their command line, because their ids may have been reused."""
    mark = b"\0--runtime_dir\0" + os.fsencode(path) + b"\0"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                if mark in line and b"\0--death_fd\0" in line:
                    yield int(entry.name)


def _lock_owner(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int((path / _LOCK).read_text())
    return None


def describe(pid: int | None) -> str:
    """A process in words, for an error message."""
    if pid is None:
        return "another process"
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return f"process {pid} ({words[:80]})"
    return f"process {pid}"
