"""A whole server with API keys: users share nothing, get equal shares, and keys leave no trace."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from glimmer.shared.secrets import key_digest
from server import (
    RunningServer,
    ServiceListener,
    free_port,
    running_server,
    under_systemd,
    wait_until,
)

KEYS = {"alice": "sk-alice", "bob": "sk-bob", "ops": "sk-ops"}
ROWS = 2


def key_lines(*names: str) -> str:
    lines = [f"{name}:{key_digest(KEYS[name])}" for name in names]
    return "\n".join(f"{line} admin" if "ops" in line else line for line in lines)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("k") / "keys"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceListener]:
    """What the server tells systemd."""
    with contextlib.closing(ServiceListener(str(tmp_path_factory.mktemp("n") / "n"))) as listener:
        yield listener


@pytest.fixture(scope="module")
def server(
    tiny_model: Path,
    key_file: Path,
    service: ServiceListener,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    """One with a key file, a key on its command line, and two rows."""
    key_file.write_text(key_lines("alice", "bob", "ops"))
    flags = ["--api_key_file", str(key_file), "--api_key", "sk-visible", "--data_type", "float32"]
    flags += ["--running_max_req_size", str(ROWS), "--metrics_port", str(free_port())]
    wrapper = under_systemd(service.address)
    directory = tmp_path_factory.mktemp("r")
    with running_server(tiny_model, directory, *flags, wrapper=wrapper) as running:
        yield running


def test_systemd_hears_of_the_start(server: RunningServer, service: ServiceListener) -> None:
    ready = service.wait_for(READY="1")
    stages = " ".join(message.get("STATUS", "") for message in service.heard[:ready])
    assert "worker 0: loading weights" in stages
    assert server.url in service.heard[ready]["STATUS"]
    assert service.wait_for(WATCHDOG="1") > ready


async def post(server: RunningServer, key: str, body: Any, path: str = "/generate") -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(server.url + path, json=body, headers=headers) as reply,
    ):
        return reply.status, await reply.json()


async def cached(server: RunningServer, name: str, prompt: list[int]) -> int:
    """Prompt tokens that this user finds in the prefix cache."""
    parameters = {"max_new_tokens": 1, "return_details": True, "ignore_eos": True}
    body = {"inputs": prompt, "parameters": parameters}
    status, reply = await post(server, KEYS[name], body)
    assert status == 200, reply
    return int(reply["tokens"][0]["prompt_cache_len"])


async def test_nobody_finds_the_prompts_of_others(server: RunningServer) -> None:
    for number in range(5):
        prompt = [number + 1] * 200
        assert await cached(server, "alice", prompt) == 0
        assert await cached(server, "bob", prompt) == 0
        assert await cached(server, "alice", prompt) == 192
        assert await cached(server, "bob", prompt) == 192


async def test_a_flood_of_one_user_does_not_delay_another(server: RunningServer) -> None:
    ended: list[str] = []

    async def ask(name: str, number: int) -> None:
        parameters = {"max_new_tokens": 20, "ignore_eos": True}
        body = {"inputs": [number % 200] * 20, "parameters": parameters}
        assert (await post(server, KEYS[name], body))[0] == 200
        ended.append(name)

    flood = [asyncio.create_task(ask("alice", number)) for number in range(60)]
    async with asyncio.timeout(60):
        while len(ended) < 5:
            await asyncio.sleep(0.005)
        before = len(ended)
        await ask("bob", 7)
        # One waits for a row, and beside it alice's requests that run may end.
        assert len(ended) - before <= 3 * ROWS + 2
        await asyncio.gather(*flood)


def test_no_key_is_in_a_command_line_an_environment_a_file_or_the_log(
    server: RunningServer,
) -> None:
    launcher = psutil.Process(server.launcher.pid)
    family = [launcher, *launcher.children(recursive=True)]
    assert len(family) >= 4
    for process in family:
        assert "sk-" not in " ".join(process.cmdline())
        if process is not launcher:
            assert not {k for k in process.environ() if k.startswith("GLIMMER_")}
    assert "--api_key **********" in " ".join(launcher.cmdline())
    for path in server.runtime_dir.iterdir():
        if path.is_file():
            assert b"sk-" not in path.read_bytes(), path
    assert "sk-" not in server.log.read_text()


async def test_keys_change_while_a_stream_runs(
    server: RunningServer, key_file: Path, service: ServiceListener
) -> None:
    service.forget()
    tokens = 300
    body = {"inputs": [1], "parameters": {"max_new_tokens": tokens, "ignore_eos": True}}
    headers = {"x-api-key": KEYS["bob"]}
    async with (
        aiohttp.ClientSession() as session,
        session.post(server.url + "/generate_stream", json=body, headers=headers) as reply,
    ):
        await reply.content.readline()
        key_file.write_text(key_lines("alice", "ops"))
        server.launcher.send_signal(signal.SIGHUP)
        probe = {"inputs": [1], "parameters": {"max_new_tokens": 1}}
        async with asyncio.timeout(20):
            while (await post(server, KEYS["bob"], probe))[0] != 401:
                await asyncio.sleep(0.02)
        assert service.wait_for(READY="1") > service.wait_for(RELOADING="1")
        rest = (await reply.read()).decode()
    assert rest.count('"finished":false') >= tokens - 20
    assert json.loads(rest.strip().rsplit("data:", 1)[1])["finished"]
    assert (await post(server, KEYS["alice"], probe))[0] == 200
    assert (await post(server, "sk-visible", probe))[0] == 200


def test_a_frontend_that_starts_while_the_file_is_broken_has_the_old_keys(
    server: RunningServer, key_file: Path
) -> None:
    good = key_file.read_text()
    key_file.write_text("what is this")
    wait_until(lambda: "the old API keys stay in use" in server.log.read_text(), 20, "a log line")
    os.kill(server.processes()["frontend-0"], signal.SIGKILL)
    time.sleep(0.1)
    wait_until(server.is_ready, 60, "the frontend is back")
    probe = {"inputs": [1], "parameters": {"max_new_tokens": 1}}
    assert asyncio.run(post(server, KEYS["alice"], probe))[0] == 200
    assert asyncio.run(post(server, KEYS["bob"], probe))[0] == 401
    key_file.write_text(good)
