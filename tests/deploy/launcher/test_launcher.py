import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

Serve = Callable[..., Any]  # the fixtures `serve` and `lasting` in ../conftest.py
READY_AGAIN = "the engine is ready again (epoch"
WORKER_LOST = "scheduler told: PeerLost(role='worker', index="
SCHEDULER_LOST = "frontend told: PeerLost(role='scheduler', index=0, reason='killed by SIGKILL'"
FRONTEND_LOST = "scheduler told: PeerLost(role='frontend'"


@pytest.fixture(scope="module")
def pairs(lasting: Serve) -> Any:
    """One server with two workers and two frontends, for tests that leave it whole."""
    server = lasting("--tp", "2", "--httpserver_workers", "2")
    server.ready_line()
    return server


@pytest.fixture
def server(pairs: Any) -> Iterator[Any]:
    """The shared server, whose log begins with the test."""
    pairs.forget_log()
    yield pairs
    pairs.await_children(scheduler=1, worker=2, frontend=2)
    assert "giving up" not in pairs.log


def kill(server: Any, mark: str) -> psutil.Process:
    victim: psutil.Process = server.children(mark)[0]
    victim.send_signal(signal.SIGKILL)
    return victim


@contextlib.contextmanager
def suspended(server: Any) -> Iterator[None]:
    """The launcher is stopped, its children are not."""
    launcher = psutil.Process(server.pid)
    launcher.suspend()
    while launcher.status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)
    yield
    launcher.resume()


def kill_and_await(victims: list[psutil.Process]) -> None:
    """Until all their threads have ended, when their parent can see it, too."""
    sentinels = [os.pidfd_open(victim.pid) for victim in victims]
    for victim in victims:
        victim.kill()
    for sentinel in sentinels:
        assert select.select([sentinel], [], [], 30)[0]
        os.close(sentinel)


def kill_together(server: Any, *roles: str) -> None:
    """Kill one child for each role, so that the launcher learns of all deaths in one wait. A role
    that is named twice loses two."""
    victims: list[psutil.Process] = []
    for role in roles:
        children = server.children(f"fake_{role}")
        victims.append(next(child for child in children if child not in victims))
    with suspended(server):
        kill_and_await(victims)


def epochs(server: Any) -> set[str]:
    """Of the live workers, from their command lines."""
    command_lines = [worker.cmdline() for worker in server.children("fake_worker")]
    return {words[words.index("--epoch") + 1] for words in command_lines}


def test_a_lost_worker_takes_its_group_along_and_comes_back(server: Any) -> None:
    old = server.children("fake_worker")
    (epoch,) = epochs(server)
    kill(server, "fake_worker")
    log = server.await_log(READY_AGAIN)
    assert WORKER_LOST in log
    assert f"reason='killed by SIGKILL', epoch={epoch})" in log
    assert len(server.children("fake_worker")) == 2
    assert not [p for p in old if p.is_running()]
    assert epochs(server) == {str(int(epoch) + 1)}


def test_a_lost_scheduler_takes_the_workers_along_and_tells_the_frontends(server: Any) -> None:
    old = server.children("fake_worker")
    kill(server, "fake_scheduler")
    log = server.await_log(READY_AGAIN, SCHEDULER_LOST)
    assert not [p for p in old if p.is_running()]
    assert "lost frontend" not in log


def test_a_lost_frontend_comes_back_on_the_same_port(server: Any) -> None:
    kill(server, "fake_frontend")
    server.await_log(FRONTEND_LOST, "started frontend")
    assert READY_AGAIN not in server.log


def test_a_worker_that_says_it_failed_is_replaced(server: Any) -> None:
    server.children("fake_worker")[0].send_signal(signal.SIGUSR1)
    log = server.await_log(READY_AGAIN)
    assert "the card fell out" in log


@pytest.mark.parametrize(
    "roles",
    [
        ("worker", "frontend"),
        ("worker", "scheduler"),
        ("worker", "worker"),
        ("frontend", "scheduler"),
        ("frontend", "frontend"),
    ],
    ids="+".join,
)
def test_two_deaths_in_one_wait_cost_one_restart_of_the_engine(
    server: Any, roles: tuple[str, str]
) -> None:
    epoch = int(max(epochs(server)))
    loses_scheduler = "scheduler" in roles
    loses_engine = loses_scheduler or "worker" in roles
    kill_together(server, *roles)
    if loses_engine:
        server.await_log(f"{READY_AGAIN} {epoch + 1})")
    server.await_children(scheduler=1, worker=2, frontend=2)
    assert epochs(server) == {str(epoch + loses_engine)}
    log = server.log
    for role in ("scheduler", "worker", "frontend"):
        assert log.count(f"lost {role} ") == roles.count(role)
    assert log.count(WORKER_LOST) == (loses_engine and not loses_scheduler)
    assert log.count(FRONTEND_LOST) == (0 if loses_scheduler else roles.count("frontend"))
    assert log.count(SCHEDULER_LOST) == (2 - roles.count("frontend")) * loses_scheduler


def test_a_failure_reported_beside_a_death_is_of_the_same_loss(server: Any) -> None:
    epoch = int(max(epochs(server)))
    first, second = server.children("fake_worker")
    with suspended(server):
        first.send_signal(signal.SIGUSR1)
        time.sleep(0.3)  # until its message has arrived
        kill_and_await([second])
    server.await_log(f"{READY_AGAIN} {epoch + 1})")
    assert server.log.count("lost worker") == 1


def test_a_restart_that_helped_does_not_count(server: Any) -> None:
    for epoch in range(int(max(epochs(server))) + 1, int(max(epochs(server))) + 5):
        kill(server, "fake_worker")
        server.await_log(f"{READY_AGAIN} {epoch})")


def test_a_lost_janitor_is_replaced(server: Any) -> None:
    first = kill(server, "launcher.janitor")
    first.wait(20)
    kill(server, "fake_frontend")  # any event after it
    server.await_log("started frontend")
    (second,) = server.children("launcher.janitor")
    assert second.pid != first.pid


def test_a_frontend_that_waits_for_its_restart_outlives_the_scheduler(serve: Serve) -> None:
    server = serve()
    server.ready_line()
    first = kill(server, "fake_frontend")
    server.await_log("started frontend")
    (second,) = server.children("fake_frontend")
    assert second.pid != first.pid
    kill(server, "fake_frontend")  # before it is ready: the next one comes half a second later
    kill(server, "fake_scheduler")
    server.await_log("the engine is ready again (epoch 1)")
    give_up = time.monotonic() + 30
    while server.log.count("started frontend") < 2:
        assert time.monotonic() < give_up, server.log
        time.sleep(0.02)
    assert server.children("fake_frontend")


def test_a_scheduler_without_heartbeat_is_replaced(serve: Serve) -> None:
    server = serve("--model_owner", "mute-scheduler")
    server.ready_line()
    log = server.await_log(
        "lost scheduler 0", "silent for 2 s", "the engine is ready again (epoch 1)"
    )
    for role in ("scheduler", "worker", "frontend"):  # before anything is killed
        stacks = log.partition(f"scheduler 0 is killed (silent for 2 s): stacks of {role} 0:")[2]
        assert f"fake_{role}.py" in stacks.partition("lost scheduler")[0]


def test_a_frontend_whose_loop_hangs_is_replaced(serve: Serve) -> None:
    server = serve("--model_owner", "mute-frontend")
    server.ready_line()
    server.await_log("lost frontend 0", "silent for 2 s", "started frontend 0 again")
    assert "lost scheduler" not in server.log


def test_a_launcher_that_was_stopped_itself_blames_nobody(serve: Serve) -> None:
    server = serve("--model_owner", "impatient-launcher")
    server.ready_line()
    stopped = [server, *server.children("fake_scheduler")]
    for process in stopped:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3)  # longer than the limit: as in a frozen container, or one that was moved
    for process in stopped:
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.2)
    kill(server, "fake_frontend")  # any event after it
    server.await_log("started frontend")
    assert "lost scheduler" not in server.log


def test_nohup_is_respected(serve: Serve) -> None:
    server = serve(wrapper=("nohup",))
    server.ready_line()
    server.signal(signal.SIGHUP)
    kill(server, "fake_frontend")  # any event after it
    server.await_log("started frontend")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_sighup_lets_the_frontends_read_files_again(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("")
    server = serve("--api_key_file", str(keys), "--httpserver_workers", "2")
    server.ready_line()
    for count in (2, 4):
        server.signal(signal.SIGHUP)
        while server.log.count("frontend told: Reload()") < count:
            server.await_log("frontend told: Reload()")
            time.sleep(0.01)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_without_files_to_read_sighup_stops(serve: Serve) -> None:
    server = serve()
    server.ready_line()
    server.signal(signal.SIGHUP)
    assert server.wait() == 0


def test_a_terminal_that_is_closed_stops_the_server(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("")
    # setsid makes the server the leader of a terminal, whose other end is this process's.
    program = (
        "import os, pty, sys, time\n"
        "pid, fd = pty.fork()\n"
        "if not pid: os.execvp(sys.argv[1], sys.argv[1:])\n"
        "output = b''\n"
        "while b'Glimmer is ready' not in output: output += os.read(fd, 1 << 16)\n"
        "os.close(fd)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    wrapper = (sys.executable, "-c", program)
    server = serve("--api_key_file", str(tmp_path / "keys"), wrapper=wrapper)
    assert server.wait() == 0


def test_an_engine_that_never_comes_back_ends_the_server(serve: Serve) -> None:
    server = serve("--model_owner", "bad-later")
    server.ready_line()
    kill(server, "fake_worker")
    assert server.wait() == 4
    log = server.log
    assert log.count("lost worker 0") == 4
    assert "giving up: 3 restarts of the engine in a row did not help; last: worker 0" in log
    assert "frontend told: PeerLost(role='scheduler'" in log
    assert not server.runtime.exists()


@pytest.mark.parametrize(
    ("victim", "name"),
    [
        ("worker", "model-00001-of-00002.safetensors"),
        ("scheduler", "tokenizer.json"),
        ("frontend", "chat_template.jinja"),
    ],
)
def test_a_process_restarts_over_touched_files_but_not_over_others(
    serve: Serve, tiny_model: Path, tmp_path: Path, victim: str, name: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    server = serve("--model_dir", str(model), "--httpserver_workers", "2")
    server.ready_line()
    for path in model.iterdir():
        path.touch()
    kill(server, f"fake_{victim}")
    server.await_log(f"started {victim} 0 again" if victim == "frontend" else READY_AGAIN)
    server.await_children(scheduler=1, worker=1, frontend=2)
    with (model / name).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"xyz")
    kill(server, f"fake_{victim}")
    assert server.wait() == 4
    problem = f"giving up: the model changed on disk while the server ran: {name}"
    assert server.log.count(problem) == 1
    told = f"frontend told: PeerLost(role='scheduler', index=0, reason='{problem[11:]}"
    assert told in server.log or victim == "frontend"  # the other one may still be starting


def test_streams_that_drain_survive_a_lost_worker_but_end_with_the_scheduler(
    serve: Serve,
) -> None:
    server = serve("--model_owner", "slow-streams", "--drain_timeout_s", "1000")
    server.ready_line()
    server.signal(signal.SIGTERM)
    server.await_log("frontend told: Shutdown(drain_s=1000.0)")
    kill(server, "fake_worker")
    server.await_log("started worker 0 again")
    server.forget_log()
    kill_together(server, "worker", "scheduler")
    server.await_log("frontend told: PeerLost(role='scheduler'", "lost worker 0")
    time.sleep(0.6)  # longer than the pause before a second restart
    assert "started" not in server.log
    assert not server.children("fake_worker")
    assert not server.children("fake_scheduler")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_two_deaths_during_a_start_end_it_with_the_schedulers_reason(serve: Serve) -> None:
    server = serve("--model_owner", "mute-worker")
    server.await_log("loading weights 75%")
    kill_together(server, "worker", "scheduler")
    assert server.wait() == 1
    assert server.log.splitlines()[-1].startswith("glimmer: scheduler 0 failed while ")
    assert not server.runtime.exists()


def test_restarts_wait_longer_each_time(serve: Serve) -> None:
    server = serve("--model_owner", "bad-later")
    server.ready_line()
    kill(server, "fake_worker")
    begun = time.monotonic()
    assert server.wait() == 4
    assert time.monotonic() - begun > 0.5 + 1.5


def test_a_crash_leaves_its_python_stack_in_the_log(serve: Serve) -> None:
    server = serve()
    server.ready_line()
    (worker,) = server.children("fake_worker")
    worker.send_signal(signal.SIGSEGV)
    log = server.await_log("lost worker 0", "the engine is ready again")
    assert "Fatal Python error: Segmentation fault" in log
    assert "fake_worker.py" in log
