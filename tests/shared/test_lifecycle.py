import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import GpuError, ModelError
from glimmer.shared.lifecycle import CONFIG_FILE, read_report, run_child, start_child
from glimmer.shared.messages import Hello
from glimmer.shared.transport import Receiver, launcher_address

# A child that says "up" once it is tied to its parent, then does nothing.
CHILD = """
import signal, sys
from glimmer.shared.lifecycle import die_with_parent
die_with_parent(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
print("up", flush=True)
signal.pause()
"""
# A parent that starts the child, tells its pid and dies by SIGKILL when its stdin closes.
PARENT = f"""
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, str(os.getpid())],
                         stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def ended(pidfd: int) -> bool:
    """Wait for the end of a process."""
    import select

    return bool(select.select([pidfd], [], [], 20)[0])


def test_a_child_dies_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    parent.communicate()
    assert parent.returncode == -signal.SIGKILL
    assert ended(child)
    os.close(child)


def test_a_child_dies_when_the_death_pipe_closes() -> None:
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(os.getpid()), str(read)],
        stdout=subprocess.PIPE,
        pass_fds=[read],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    os.close(write)
    assert child.wait(20) == -signal.SIGKILL
    child.stdout.close()
    os.close(read)


def test_a_child_that_lost_its_parent_before_it_started_dies_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, "1"], timeout=20, check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_child_reads_the_config_and_greets_the_launcher(tmp_path: Path) -> None:
    config = ServeConfig(model_dir="m", eos_id=(1,))
    config.save(tmp_path / CONFIG_FILE)
    with Receiver.bind(launcher_address(str(tmp_path))) as inbox:
        child = start_child("worker", ["--runtime_dir", str(tmp_path), "--index", "3"])
        assert child.config == config
        assert inbox.receive(10) == [Hello("worker", 3, os.getpid(), config.config_hash())]
        child.launcher.close()


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (ModelError("shard 3 is truncated"), 4, "shard 3 is truncated"),
        (GpuError("lost"), 6, "lost"),
        (ZeroDivisionError("a bug"), 1, "ZeroDivisionError: a bug"),
    ],
)
def test_a_failing_child_leaves_reason_and_exit_code(
    tmp_path: Path, error: Exception, code: int, reason: str
) -> None:
    def main() -> int:
        raise error

    report = os.memfd_create("report")
    words = ["--runtime_dir", str(tmp_path), "--report_fd", str(report)]
    assert run_child(lambda: 0, words) == 0
    assert read_report(report) == ("", "")
    assert run_child(main, words) == code
    assert read_report(report) == ("", reason)
    os.close(report)
    assert run_child(main, ["--runtime_dir", str(tmp_path)]) == code
