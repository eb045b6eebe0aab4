"""The private directory that holds one server's sockets and settled configuration.

A directory belongs to the live process that holds its lock file. The lock is taken first, because
binding an ipc socket succeeds silently on a path that is in use. Imports no other libraries,
because the janitor uses it.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...shared.config import environment
from ...shared.errors import ConfigError, PortError

_LOCK = "lock"
_FILES = ("*.sock", "config.json*", "api-keys*", "ranks-*", "grammars-*", _LOCK)
_PREFIX = "glimmer-"
_LOCK_WAIT_S = 1.0  # the janitor of a server that just died may hold the lock
_KILL_WAIT_S = 10.0
_CREATION_S = 60.0  # an older directory without a lock was left by a server that died at once
_SOCKET_PATH_BYTES = 107  # limit of the kernel, without the terminating zero
_LONGEST_NAME = "/worker-999999-1023.sock"


@dataclass(frozen=True)
class RuntimeDir:
    """A locked runtime directory. The locks are released when this process ends. That of the
    directory itself tells systemd-tmpfiles to leave it alone."""

    path: Path
    created: bool  # by this process, which then removes it at the end instead of emptying it
    lock_fd: int
    dir_fd: int

    def remove(self) -> None:
        """Remove all files of a server, and the directory if this process created it."""
        with contextlib.suppress(OSError):  # a disk that is read-only now
            empty(self.path, self.created)
        os.close(self.lock_fd)
        os.close(self.dir_fd)

    def repair(self, name: str, content: bytes) -> str:
        """Make again: the directory, the lock, and file `name`, if they were removed. Returns which
        files were missing, "" if none were. Raises OSError if it cannot be made, BlockingIOError if
        another server took the directory."""
        missing = [file for file in (_LOCK, name) if not (self.path / file).exists()]
        if not missing:
            return ""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(self.path):
            raise PermissionError(errno.EPERM, "it is not a private directory any more")
        if _LOCK in missing:
            lock_fd = try_lock(self.path, 0.0)
            if lock_fd is None:
                raise BlockingIOError(errno.EWOULDBLOCK, "another server uses it")
            os.dup2(lock_fd, self.lock_fd, inheritable=False)
            os.close(lock_fd)
            _write_owner(self.path)
            dir_fd = _lock_directory(self.path)
            os.dup2(dir_fd, self.dir_fd, inheritable=False)
            os.close(dir_fd)
        if name in missing:
            _write_whole(self.path / name, content)
        return " and ".join(missing)


def default_parent() -> Path:
    """The parent of default runtime directories: $XDG_RUNTIME_DIR, or the temporary directory."""
    parent = Path(environment().get("XDG_RUNTIME_DIR", ""))
    usable = parent.is_absolute() and os.access(parent, os.W_OK | os.X_OK)
    return parent if usable else Path(tempfile.gettempdir())


def claim_name(name: str) -> RuntimeDir | None:
    """Lock a name among this user's servers, by a directory. Raises BlockingIOError naming the
    process that holds it. None if there can be no such directory, because another user has one."""
    path = default_parent() / f"{_PREFIX}{os.geteuid()}-{name}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        is_ours = _is_private(path) and not path.is_symlink()
        lock_fd = try_lock(path, 0.0) if is_ours else -1
        if lock_fd is not None and lock_fd >= 0:
            _write_owner(path)
            return RuntimeDir(path, True, lock_fd, _lock_directory(path))
    except OSError:
        return None
    if lock_fd is None:
        raise BlockingIOError(errno.EWOULDBLOCK, describe(_lock_owner(path)))
    return None


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
    if not _is_private(path):
        raise ConfigError(f"--runtime_dir {path}: must be your own private directory (chmod 700)")
    lock_fd = try_lock(path, _LOCK_WAIT_S)
    if lock_fd is None:
        raise PortError(
            f"--runtime_dir {path} is in use by {describe(_lock_owner(path))}; "
            "stop that server or choose another directory"
        )
    kill_leftovers(path)
    empty(path, whole=False, keep=_LOCK)
    _write_owner(path)
    return RuntimeDir(path, created, lock_fd, _lock_directory(path))


def _is_private(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _write_owner(path: Path) -> None:
    (path / _LOCK).write_text(str(os.getpid()))


def _lock_directory(path: Path) -> int:
    dir_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # it only keeps cleaners away
        fcntl.flock(dir_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return dir_fd


def _write_whole(path: Path, content: bytes) -> None:
    """Write a private file, which appears at its name when it is complete."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    part.write_bytes(content)
    part.rename(path)


def try_lock(path: Path, wait_s: float) -> int | None:
    """The open, locked lock file of a directory; None if another process holds it for longer than
    `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        fd = os.open(path / _LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
    with tempfile.TemporaryFile(dir=parent) as file:
        now = os.fstat(file.fileno()).st_mtime  # by the clock of this file system
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.geteuid():
                continue
            if not (path / _LOCK).exists():  # not a runtime directory, or still being created
                if now - path.stat().st_mtime > _CREATION_S:
                    path.rmdir()  # fails if there is anything in it
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
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file, ignore_errors=True)
            elif file.name != keep:
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
