"""SIGKILL of each process while 20 streams run: every stream ends, nothing is left behind."""

import asyncio
import json
import os
import signal
from pathlib import Path

import aiohttp
import psutil
import pytest
from server import RunningServer, running_server, wait_until

STREAMS = 20
TOKENS = 120


async def stream(server: RunningServer, number: int, started: asyncio.Event) -> str:
    """One streamed request; returns how it ended: "done", "error" or "broken"."""
    body = {
        "inputs": [number + 1] * 20,
        "parameters": {"max_new_tokens": TOKENS, "ignore_eos": True},
    }
    events = []
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(server.url + "/generate_stream", json=body) as reply,
        ):
            async for line in reply.content:
                if line.startswith(b"data:"):
                    events.append(json.loads(line[5:]))
                    started.set()
    except aiohttp.ClientError:
        return "broken"
    if events and events[-1].get("finished"):
        ids = [event["token"]["id"] for event in events]
        assert len(ids) == TOKENS, "a token was lost or doubled"
        return "done"
    return "error" if events and "error" in events[-1] else "broken"


async def kill_during_streams(server: RunningServer, victim: str) -> list[str]:
    """Start the streams, SIGKILL `victim` once they run, return the endings."""
    started = [asyncio.Event() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(stream(server, i, started[i])) for i in range(STREAMS)]
    await asyncio.gather(*(asyncio.wait_for(event.wait(), 30) for event in started))
    pid = server.launcher.pid if victim == "launcher" else server.processes()[victim]
    os.kill(pid, signal.SIGKILL)
    return await asyncio.wait_for(asyncio.gather(*tasks), 40)


@pytest.mark.parametrize(
    ("victim", "expected"),
    [
        ("worker-0", {"done"}),
        ("worker-1", {"done"}),
        ("scheduler-0", {"error"}),
        ("frontend-0", {"broken"}),
        ("janitor-0", {"done"}),
    ],
)
def test_a_killed_process_is_replaced_and_every_stream_ends(
    tiny_model: Path, tmp_path: Path, victim: str, expected: set[str]
) -> None:
    flags = ("--tp", "2") if victim == "worker-1" else ()
    with running_server(tiny_model, tmp_path, *flags) as server:
        before = server.token_ids([5, 6, 7], max_new_tokens=8, ignore_eos=True)
        old = server.processes()[victim]
        endings = asyncio.run(kill_during_streams(server, victim))
        assert set(endings) <= expected | {"done"}, endings
        wait_until(server.is_ready, 60, f"ready again after {victim} died")
        wait_until(lambda: server.processes().get(victim, old) != old, 10, f"a new {victim}")
        assert server.token_ids([5, 6, 7], max_new_tokens=8, ignore_eos=True) == before
        wait_until(
            lambda: server.metric("lightllm_num_running_reqs") == 0, 10, "no request left behind"
        )


def test_a_killed_launcher_takes_everything_with_it(tiny_model: Path, tmp_path: Path) -> None:
    with running_server(tiny_model, tmp_path) as server:
        pids = list(server.processes().values())
        endings = asyncio.run(kill_during_streams(server, "launcher"))
        assert set(endings) <= {"broken", "error"}, endings
        server.launcher.wait()
        wait_until(lambda: not any(map(psutil.pid_exists, pids)), 5, "all processes gone")
        wait_until(lambda: not server.runtime_dir.exists(), 5, "runtime directory gone")
        assert server.get("/health")[0] == 0
    with running_server(tiny_model, tmp_path / "again", port=server.port) as second:
        assert second.is_ready()
