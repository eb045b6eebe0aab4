import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from glimmer.deploy.demo.checkpoint import make_checkpoint

Serve = Callable[..., Any]  # the fixture in conftest.py


def port_of(ready_line: str) -> int:
    assert "Glimmer is ready: http://127.0.0.1:" in ready_line
    return int(ready_line.split()[3].rpartition(":")[2])


def test_a_server_starts_and_says_where_it_is(serve: Serve) -> None:
    flags = ("--tp", "2", "--httpserver_workers", "2", "--model_name", "mine")
    few_files = ("sh", "-c", 'ulimit -Sn 256; exec "$@"', "sh")
    server = serve(*flags, wrapper=few_files)
    line = server.ready_line()
    assert "model mine" in line
    assert "KV cache 512 tokens" in line
    with socket.create_connection(("127.0.0.1", port_of(line))):
        pass
    names = [" ".join(p.cmdline()) for p in server.children()]
    for mark, count in (("scheduler", 1), ("worker", 2), ("frontend", 2), ("janitor", 1)):
        assert sum(f"fake_{mark}" in n or f"launcher.{mark}" in n for n in names) == count
    assert server.runtime.stat().st_mode & 0o777 == 0o700
    assert "worker 1: loading weights 75%" in server.log
    for frontend in server.children("fake_frontend"):  # each connection is a file
        soft, hard = frontend.rlimit(psutil.RLIMIT_NOFILE)
        assert soft == min(hard, 65536) > 256


def test_sigterm_drains_and_leaves_nothing(serve: Serve) -> None:
    server = serve()
    server.ready_line()
    processes = server.children()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not [p for p in processes if p.is_running()]
    assert not server.runtime.exists()
    told = [line for line in server.log.splitlines() if "told" in line]
    assert told[0].endswith("Shutdown(drain_s=60.0)")
    assert told[-1] == "scheduler told: Shutdown(drain_s=0.0)"


def test_ctrl_c_reaches_only_the_launcher(serve: Serve) -> None:
    server = serve()
    server.ready_line()
    assert {os.getsid(p.pid) for p in server.children()} & {os.getsid(server.pid)} == set()
    server.signal(signal.SIGINT)
    assert server.wait() == 0
    assert "Traceback" not in server.log


def test_a_second_signal_stops_at_once(serve: Serve) -> None:
    server = serve("--model_owner", "slow-streams", "--drain_timeout_s", "1000")
    server.ready_line()
    server.signal(signal.SIGTERM)
    server.await_log("frontend told: Shutdown(drain_s=1000.0)")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_drain_ends_when_its_time_is_over(serve: Serve) -> None:
    server = serve("--model_owner", "slow-streams", "--drain_timeout_s", "0.1")
    server.ready_line()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_requests_are_accepted_for_the_delay_and_a_second_signal_ends_it(serve: Serve) -> None:
    short, long = serve("--drain_delay_s", "0.1"), serve("--drain_delay_s", "1000")
    port = port_of(long.ready_line())
    short.ready_line()
    for server in (short, long):
        server.signal(signal.SIGTERM)
    assert short.wait() == 0
    assert "frontend told: Shutdown(drain_s=60.0)" in short.log
    long.await_log("new requests are accepted for 1000 s")
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"x")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert "told: Shutdown" not in long.log
    long.signal(signal.SIGTERM)
    assert long.wait() == 0


def test_a_stop_during_the_start_is_followed(serve: Serve) -> None:
    server = serve("--model_owner", "mute-worker")
    server.await_log("loading weights 75%")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not server.runtime.exists()


def test_sigkill_of_the_launcher_leaves_nothing(serve: Serve) -> None:
    server = serve("--tp", "2")
    port = port_of(server.ready_line())
    processes = server.children()
    assert len(processes) == 5
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"x")
        while connection.recv(1 << 16):  # the server closes first and its end lingers
            pass
    server.signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    assert not server.runtime.exists()
    again = serve(port=port, runtime=server.runtime)
    assert port_of(again.ready_line()) == port


def test_the_port_is_refused_until_ready(serve: Serve) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = serve("--model_owner", "mute-worker", port=port)
    server.await_log("loading weights 75%")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    other = serve(port=port)
    assert other.wait() == 5
    assert f"port {port} is in use by process {server.pid} (" in other.log


def test_two_servers_on_one_port_or_directory_do_not_meet(serve: Serve) -> None:
    first = serve()
    port = port_of(first.ready_line())
    same_port, same_dir = serve(port=port), serve(runtime=first.runtime)
    assert (same_port.wait(), same_dir.wait()) == (5, 5)
    assert f"glimmer: port {port} is in use by process {first.pid} (" in same_port.log
    expected = f"glimmer: --runtime_dir {first.runtime} is in use by process {first.pid} ("
    assert expected in same_dir.log
    assert len(same_port.log.splitlines()[-1]) < 300
    first.signal(signal.SIGTERM)
    assert first.wait() == 0


@pytest.mark.parametrize(
    ("manner", "code", "reason"),
    [
        ("bad-model", 4, "worker 0 failed while loading weights: shard 3 is truncated"),
        ("crash", 1, "worker 0 failed while loading weights: ZeroDivisionError: a bug"),
        ("stranger", 3, "worker 0 runs another version or configuration"),
    ],
)
def test_a_child_that_cannot_start_ends_the_start_with_its_reason(
    serve: Serve, manner: str, code: int, reason: str
) -> None:
    server = serve("--model_owner", manner)
    assert server.ready_line() == ""
    assert server.wait() == code
    assert server.log.splitlines()[-1].startswith(f"glimmer: {reason}")
    assert not server.runtime.exists()


def test_a_start_without_progress_is_given_up(serve: Serve) -> None:
    server = serve("--model_owner", "mute-worker", "--start_timeout_s", "2")
    assert server.wait() == 1
    assert "worker 0 failed while loading weights: silent for " in server.log.splitlines()[-1]


def test_problems_are_found_before_anything_starts(serve: Serve, tiny_model: Path) -> None:
    started = [
        (serve("--tp", "3"), 3, "--tp 3 does not divide"),
        (serve("--model_dir", str(tiny_model.parent)), 4, "has no config.json"),
        (serve("--prt", "1"), 2, "did you mean --port?"),
        (serve("--host", "203.0.113.1"), 3, "give an address of this machine"),
    ]
    for server, code, words in started:
        assert server.wait() == code
        assert words in server.log.splitlines()[-1]
        assert server.log.splitlines()[-1].startswith("glimmer: ")
        assert "Traceback" not in server.log
        assert "worker 0" not in server.log
        assert not server.runtime.exists()


def test_the_guides_launch_script_with_drafts_starts(serve: Serve, tmp_path: Path) -> None:
    model = tmp_path / "GLM-4.7-Flash"
    make_checkpoint(model, max_position_embeddings=202752)
    script = f"""--model_dir {model}/ --tp 1 --max_req_total_len 202752
        --chunked_prefill_size 8192 --llm_prefill_att_backend fa3
        --llm_decode_att_backend flashinfer --graph_max_batch_size 512 --tool_call_parser glm47
        --reasoning_parser glm45 --mtp_step 4 --mtp_mode eagle_with_att
        --mtp_draft_model_dir {model}/ --host 0.0.0.0"""
    server = serve(*script.split())
    assert "model GLM-4.7-Flash" in server.ready_line()
    assert "attention runs on the torch reference instead of fa3 and flashinfer" in server.log


def test_many_servers_start_side_by_side(serve: Serve) -> None:
    servers = [serve() for _ in range(4)]
    ports: list[int] = []
    readers = [
        threading.Thread(target=lambda s=s: ports.append(port_of(s.ready_line()))) for s in servers
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(set(ports)) == len(servers)
