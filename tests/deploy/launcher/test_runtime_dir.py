import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from glimmer.deploy.launcher.runtime_dir import claim_runtime_dir, describe
from glimmer.shared.errors import ConfigError, PortError

# Claims a directory, says so, and keeps it until its stdin closes.
HOLDER = """
import sys
from collections.abc import Callable
from pathlib import Path
from glimmer.deploy.launcher.runtime_dir import claim_runtime_dir
runtime = claim_runtime_dir(Path(sys.argv[1]), Path(sys.argv[1]).parent)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a short name: sockets lie below it."""
    return tmp_path_factory.mktemp("r")


def test_a_new_directory_is_private_and_goes_away(tmp_path: Path) -> None:
    runtime = claim_runtime_dir(None, tmp_path)
    assert runtime.path.parent == tmp_path
    assert runtime.path.stat().st_mode & 0o777 == 0o700
    (runtime.path / "launcher.sock").touch()
    (runtime.path / "ranks-12").touch()
    (runtime.path / "grammars-0").mkdir()
    (runtime.path / "grammars-0" / "one").touch()
    runtime.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_given_directory_is_only_emptied_of_our_files(tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.mkdir(mode=0o700)
    (path / "notes").touch()
    (path / "worker-0-0.sock").touch()  # of a server that died
    runtime = claim_runtime_dir(path, tmp_path)
    assert {p.name for p in path.iterdir()} == {"notes", "lock"}
    runtime.remove()
    assert [p.name for p in path.iterdir()] == ["notes"]


def test_a_directory_in_use_names_its_server_and_stays_intact(tmp_path: Path) -> None:
    path = tmp_path / "r"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    (path / "launcher.sock").touch()
    with pytest.raises(PortError, match=rf"in use by process {holder.pid} \(") as caught:
        claim_runtime_dir(path, tmp_path)
    assert caught.value.exit_code == 5
    assert (path / "launcher.sock").exists()
    holder.communicate()
    claim_runtime_dir(path, tmp_path).remove()  # free again


def test_stale_directories_are_swept_but_living_and_foreign_ones_stay(tmp_path: Path) -> None:
    stale, living = (claim_runtime_dir(None, tmp_path) for _ in range(2))
    os.close(stale.lock_fd)  # as when its process dies
    (stale.path / "config.json").touch()
    foreign = tmp_path / "glimmer-notes"
    foreign.mkdir()
    (tmp_path / "glimmer-link").symlink_to(living.path)
    new = claim_runtime_dir(None, tmp_path)
    assert not stale.path.exists()
    assert living.path.exists()
    assert foreign.exists()
    new.remove()
    living.remove()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.mkdir(mode=0o755), "chmod 700"),
        (lambda p: p.touch(), "File exists"),
        (lambda p: (p.parent / "file").touch(), "--runtime_dir"),
    ],
)
def test_a_directory_that_cannot_be_private_is_refused(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "r"
    make(path)
    target = path if path.exists() else tmp_path / "file" / "r"
    with pytest.raises(ConfigError, match=words):
        claim_runtime_dir(target, tmp_path)


def test_a_path_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shorter path"):
        claim_runtime_dir(tmp_path / ("x" * 100), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_processes_are_described_by_what_they_run() -> None:
    assert describe(os.getpid()).startswith(f"process {os.getpid()} (")
    assert describe(None) == "another process"
    assert describe(1 << 30) == f"process {1 << 30}"


def test_a_directory_of_a_server_that_died_before_it_locked_goes_away(tmp_path: Path) -> None:
    left, starting, full = (tmp_path / f"glimmer-{name}" for name in ("left", "starting", "full"))
    for path in (left, starting, full):
        path.mkdir(mode=0o700)
    (full / "mine").touch()
    for path in (left, full):
        os.utime(path, (0, 0))
    claim_runtime_dir(None, tmp_path).remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["glimmer-full", "glimmer-starting"]


def test_what_was_removed_is_made_again_and_locked(tmp_path: Path) -> None:
    runtime = claim_runtime_dir(tmp_path / "r", tmp_path)
    assert runtime.repair("lock", b"") == ""
    assert runtime.repair("config.json", b"{}") == "config.json"
    shutil.rmtree(runtime.path)
    assert runtime.repair("config.json", b"{}") == "lock and config.json"
    assert (runtime.path / "config.json").read_bytes() == b"{}"
    assert runtime.path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(PortError, match=f"process {os.getpid()} "):
        claim_runtime_dir(runtime.path, tmp_path)
    shutil.rmtree(runtime.path)
    runtime.path.mkdir(mode=0o755)  # not by us
    with pytest.raises(PermissionError):
        runtime.repair("config.json", b"{}")
    runtime.path.chmod(0o700)
    runtime.remove()
