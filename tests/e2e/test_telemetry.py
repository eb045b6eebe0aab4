"""Logs and metrics of a real server with two HTTP processes."""

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import RunningServer, running_server, wait_until

REQUESTS = 6


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    flags = ("--httpserver_workers", "2", "--log_format", "json", "--access_log")
    with running_server(tiny_model, tmp_path_factory.mktemp("t"), *flags) as running:
        yield running


def lines(server: RunningServer) -> list[dict[str, Any]]:
    """All lines of the log but the one on stdout. Each must be JSON."""
    texts = server.log.read_text().splitlines()
    return [json.loads(text) for text in texts if not text.startswith("Glimmer is ready")]


def test_a_scrape_shows_all_processes_and_keeps_what_a_dead_one_counted(
    server: RunningServer,
) -> None:
    for _ in range(REQUESTS):
        server.generate([1, 2, 3], max_new_tokens=2)
    name = "lightllm_request_count_total"
    wait_until(lambda: server.metric(name) == REQUESTS, 10, "all have reported")
    assert {server.metric(name) for _ in range(6)} == {REQUESTS}, "from whichever process"
    for frontend in ("frontend-0", "frontend-1"):
        old = server.processes()[frontend]
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: server.processes().get(frontend, old) != old, 60, "a new process")  # noqa: B023
        assert server.metric(name) == REQUESTS
    server.generate([1, 2, 3], max_new_tokens=2)
    wait_until(lambda: server.metric(name) == REQUESTS + 1, 10, "the new one counts, too")
    assert server.metric("vllm:request_success_total", finished_reason="length") == REQUESTS + 1


def test_every_line_is_json_and_those_of_a_request_have_its_id(server: RunningServer) -> None:
    body = json.dumps({"inputs": "the secret prompt", "parameters": {"max_new_tokens": 2}})
    request = urllib.request.Request(
        server.url + "/generate",
        body.encode(),
        {"Content-Type": "application/json", "X-Request-Id": "mine"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        assert reply.headers["X-Request-Id"] == "mine"
    wait_until(
        lambda: '"message": "access", "request_id": "mine"' in server.log.read_text(), 10, ""
    )
    about = {line["message"]: line for line in lines(server) if line.get("request_id") == "mine"}
    assert set(about) == {"request ended", "access"}
    assert about["request ended"]["output_tokens"] == 2
    assert about["access"]["status"] == 200
    assert {line["process"] for line in lines(server)} >= {"launcher", "worker-0", "frontend-0"}
    assert "secret prompt" not in server.log.read_text()
