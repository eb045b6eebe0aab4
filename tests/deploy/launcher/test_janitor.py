import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from glimmer.deploy.launcher.runtime_dir import RuntimeDir, claim_runtime_dir

SLEEPER = "import signal; print('up', flush=True); signal.pause()"


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeDir:
    found = claim_runtime_dir(tmp_path / "r", tmp_path)
    (found.path / "scheduler.sock").touch()
    return found


@contextmanager
def janitor(path: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A running janitor and the pipe end that a launcher would hold."""
    read, write = os.pipe()
    command = [sys.executable, "-m", "glimmer.deploy.launcher.janitor", "--watch_fd", str(read)]
    process = subprocess.Popen([*command, "--sweep_dir", str(path), *flags], pass_fds=[read])
    os.close(read)
    yield process, write
    process.wait(20)


def sleeper(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SLEEPER, "--runtime_dir", str(path), "--death_fd", "9"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def test_it_ends_children_and_removes_the_directory_of_a_killed_launcher(
    runtime: RuntimeDir,
) -> None:
    child, stranger = sleeper(runtime.path), sleeper(runtime.path.parent)
    with janitor(runtime.path, "--whole") as (process, write):
        os.close(runtime.lock_fd)
        os.close(write)
    assert process.returncode == 0
    assert child.wait(20) == -signal.SIGKILL
    assert not runtime.path.exists()
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_it_leaves_a_directory_that_was_given(runtime: RuntimeDir) -> None:
    with janitor(runtime.path) as (_, write):
        os.close(runtime.lock_fd)
        os.close(write)
    assert list(runtime.path.iterdir()) == []


def test_it_leaves_a_directory_that_a_new_server_has_taken(runtime: RuntimeDir) -> None:
    with janitor(runtime.path, "--whole") as (process, write):
        os.close(write)
    assert process.returncode == 0
    assert (runtime.path / "scheduler.sock").exists()
    runtime.remove()


def test_it_ends_quietly_when_the_launcher_cleaned_up(runtime: RuntimeDir) -> None:
    with janitor(runtime.path, "--whole") as (process, write):
        runtime.remove()
        os.close(write)
    assert process.returncode == 0
    assert not runtime.path.exists()


def ignored(pid: int) -> set[int]:
    status = Path(f"/proc/{pid}/status").read_text()
    (text,) = re.findall(r"^SigIgn:\s+(\w+)", status, re.MULTILINE)
    mask = int(text, 16)
    return {number for number in range(1, 32) if mask >> (number - 1) & 1}


def test_it_ignores_the_signals_that_stop_a_server(runtime: RuntimeDir) -> None:
    stops = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    with janitor(runtime.path, "--whole") as (process, write):
        while not ignored(process.pid) >= stops:
            assert process.poll() is None
        for number in stops:
            process.send_signal(number)
        os.close(runtime.lock_fd)
        os.close(write)
    assert process.returncode == 0
    assert not runtime.path.exists()


def test_it_loads_next_to_nothing() -> None:
    code = (
        "import sys, glimmer.deploy.launcher.janitor; print(len(sys.modules), 'zmq' in sys.modules)"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert out.endswith("False\n")
