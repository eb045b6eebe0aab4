import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil

Serve = Callable[..., Any]  # the fixture in conftest.py


def kill(server: Any, mark: str) -> psutil.Process:
    victim: psutil.Process = server.children(mark)[0]
    victim.send_signal(signal.SIGKILL)
    return victim


def test_a_lost_worker_takes_its_group_along_and_comes_back(serve: Serve) -> None:
    server = serve("--tp", "2")
    server.ready_line()
    old = server.children("fake_worker")
    kill(server, "fake_worker")
    log = server.await_log("the engine is ready again (epoch 1)")
    assert "PeerLost(role='worker', index=" in log
    assert "reason='killed by SIGKILL', epoch=0)" in log
    new = server.children("fake_worker")
    assert len(new) == 2
    assert not [p for p in old if p.is_running()]
    assert all("--epoch 1" in " ".join(p.cmdline()) for p in new)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_lost_scheduler_takes_the_workers_along_and_tells_the_frontends(serve: Serve) -> None:
    server = serve()
    server.ready_line()
    old = server.children("fake_worker")
    kill(server, "fake_scheduler")
    told = "frontend told: PeerLost(role='scheduler', index=0, reason='killed by SIGKILL'"
    server.await_log("the engine is ready again (epoch 1)", told)
    assert not [p for p in old if p.is_running()]
    assert len(server.children("fake_frontend")) == 1


def test_a_lost_frontend_comes_back_on_the_same_port(serve: Serve) -> None:
    server = serve("--httpserver_workers", "2")
    server.ready_line()
    kill(server, "fake_frontend")
    server.await_log("scheduler told: PeerLost(role='frontend'", "started frontend")
    assert len(server.children("fake_frontend")) == 2
    assert "epoch 1" not in server.log


def test_a_worker_that_says_it_failed_is_replaced(serve: Serve) -> None:
    server = serve()
    server.ready_line()
    server.children("fake_worker")[0].send_signal(signal.SIGUSR1)
    log = server.await_log("the engine is ready again (epoch 1)")
    assert "the card fell out" in log


def test_a_scheduler_without_heartbeat_is_replaced(serve: Serve) -> None:
    server = serve("--model_owner", "mute-scheduler")
    server.ready_line()
    server.await_log("lost scheduler 0", "silent for 2 s", "the engine is ready again (epoch 1)")


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


def test_a_restart_that_helped_does_not_count(serve: Serve) -> None:
    server = serve()
    server.ready_line()
    for epoch in range(1, 6):
        kill(server, "fake_worker")
        server.await_log(f"the engine is ready again (epoch {epoch})")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


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


def test_nohup_is_respected(serve: Serve) -> None:
    server = serve(wrapper=("nohup",))
    server.ready_line()
    server.signal(signal.SIGHUP)
    kill(server, "fake_frontend")  # any event after it
    server.await_log("started frontend")
    server.signal(signal.SIGTERM)
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


def test_streams_that_drain_survive_a_lost_worker_but_end_with_the_scheduler(
    serve: Serve,
) -> None:
    server = serve("--model_owner", "slow-streams", "--drain_timeout_s", "1000")
    server.ready_line()
    server.signal(signal.SIGTERM)
    server.await_log("frontend told: Shutdown(drain_s=1000.0)")
    kill(server, "fake_worker")
    server.await_log("started worker 0 again")
    kill(server, "fake_scheduler")
    server.await_log("frontend told: PeerLost(role='scheduler'")
    assert not server.children("fake_worker")
    assert not server.children("fake_scheduler")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_lost_janitor_is_replaced(serve: Serve) -> None:
    server = serve()
    server.ready_line()
    first = kill(server, "deploy.janitor")
    first.wait(20)
    kill(server, "fake_frontend")  # any event after it
    server.await_log("started frontend")
    (second,) = server.children("deploy.janitor")
    assert second.pid != first.pid
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
