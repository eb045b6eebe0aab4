import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from glimmer.deploy.launcher.supervise import Children, Modules, Process, describe_exit

MODULE = """
import argparse, os, signal, sys
parser = argparse.ArgumentParser()
for flag in ("runtime_dir", "index", "epoch", "parent_pid", "death_fd", "listen_fd", "report_fd",
             "usage_fd", "certificate_fd"):
    parser.add_argument("--" + flag)
args = parser.parse_args()
assert int(args.parent_pid) == os.getppid()
os.fstat(int(args.death_fd))
if args.listen_fd:
    os.fstat(int(args.listen_fd))
if args.index == "7":
    os.write(int(args.report_fd), b"\\0out of luck")
    sys.exit(6)
signal.pause()
"""


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Children]:
    (tmp_path / "waiter.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with socket.socket() as listener:
        modules = Modules(scheduler="waiter", worker="waiter", frontend="waiter")
        children = Children(tmp_path, modules, 1, listener.fileno())
        yield children
        children.close()
    assert not children.alive


def ended(children: Children, process: Process) -> tuple[Process, str]:
    process.popen.wait(20)
    (found,) = children.reap()
    return found


def test_children_are_found_and_reaped_with_the_reason(children: Children) -> None:
    scheduler = children.spawn("scheduler", 0, 0)
    worker = children.spawn("worker", 1, 2)
    assert children.of("worker") == [worker]
    assert children.find("scheduler", 0) is scheduler
    assert children.find("worker", 0) is None
    assert children.reap() == []
    os.kill(worker.popen.pid, signal.SIGKILL)
    assert ended(children, worker) == (worker, "killed by SIGKILL")
    assert children.alive == [scheduler]


def test_a_child_can_leave_its_reason(children: Children) -> None:
    process = children.spawn("frontend", 7, 0)
    assert ended(children, process) == (process, "out of luck")
    assert process.popen.returncode == 6


def test_a_dead_child_leaves_no_socket(children: Children) -> None:
    worker = children.spawn("worker", 1, 2)
    (children.runtime_dir / "worker-2-1.sock").touch()
    children.kill([worker])
    assert not (children.runtime_dir / "worker-2-1.sock").exists()


def test_a_machine_without_free_file_descriptors_is_an_error_that_leaves_nothing(
    children: Children,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    problems: list[str] = []
    for extra in range(12):  # each place where they can run out
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + extra, hard))
        try:
            children.kill([children.spawn("worker", 0, extra)])
            break
        except OSError as error:
            problems.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not children.alive
    assert problems
    assert all("Too many open files" in problem for problem in problems)
    give_up = time.monotonic() + 20
    while len(os.listdir("/proc/self/fd")) > before + 1:  # ZeroMQ closes in its own time
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_killing_waits_until_they_are_gone(children: Children) -> None:
    processes = [children.spawn("worker", rank, 0) for rank in range(2)]
    children.kill(processes)
    assert [p.popen.returncode for p in processes] == [-signal.SIGKILL] * 2
    assert children.reap() == []


def test_exits_in_words() -> None:
    assert describe_exit(-11) == "killed by SIGSEGV"
    assert describe_exit(3) == "exit code 3"
