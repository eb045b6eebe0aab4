"""SIGKILL and SIGSTOP of each process while 20 streams run: every stream ends, nothing is left.

Tokens of streams that survive are those of streams that nothing happened to.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from server import RunningServer, reachable, running_server, wait_until

STREAMS = 20
TOKENS = 120
STEP_TIMEOUT_S = 7  # for stopped workers; a busy machine may need some seconds for a step


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all that it should survive."""
    flags = ("--data_type", "float32", "--step_timeout_s", str(STEP_TIMEOUT_S))
    with running_server(tiny_model, tmp_path_factory.mktemp("faults"), *flags) as running:
        yield running


async def stream(server: RunningServer, number: int, started: asyncio.Event) -> str | list[int]:
    """One streamed request; returns its tokens, or "error" or "broken"."""
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
        return [event["token"]["id"] for event in events]
    return "error" if events and "error" in events[-1] else "broken"


async def during_streams(server: RunningServer, act: Callable[[], None]) -> list[str | list[int]]:
    """Start the streams, `act` once all run, return their endings."""
    started = [asyncio.Event() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(stream(server, i, started[i])) for i in range(STREAMS)]
    await asyncio.gather(*(asyncio.wait_for(event.wait(), 60) for event in started))
    await asyncio.to_thread(act)
    return await asyncio.wait_for(asyncio.gather(*tasks), 90)


@pytest.fixture(scope="module")
def undisturbed(server: RunningServer) -> list[list[int]]:
    """The streams' tokens when nothing happens."""
    endings = asyncio.run(during_streams(server, lambda: None))
    assert all(len(ending) == TOKENS for ending in endings)
    return [ending for ending in endings if isinstance(ending, list)]


def send(server: RunningServer, name: str, number: signal.Signals = signal.SIGKILL) -> int:
    """Signal a child; returns its process id."""
    pid = server.processes()[name]
    os.kill(pid, number)
    return pid


def survives(
    server: RunningServer,
    undisturbed: list[list[int]],
    act: Callable[[], None],
    or_else: str = "",
) -> None:
    """Streams end whole or `or_else`; the server works again, nothing is kept."""
    for number, ending in enumerate(asyncio.run(during_streams(server, act))):
        assert ending in (or_else, undisturbed[number]), (number, ending)
    wait_until(server.is_ready, 60, "ready again")
    assert server.token_ids([1] * 20, max_new_tokens=9, ignore_eos=True) == undisturbed[0][:9]
    wait_until(
        lambda: server.metric("lightllm_num_running_reqs") == 0, 20, "no request left behind"
    )


@pytest.mark.parametrize(
    ("victim", "or_else"),
    [
        ("scheduler-0", "error"),
        ("frontend-0", "broken"),
    ],
)
def test_a_killed_process_is_replaced_and_every_stream_ends(
    server: RunningServer, undisturbed: list[list[int]], victim: str, or_else: str
) -> None:
    old = server.processes()[victim]
    survives(server, undisturbed, lambda: send(server, victim) and None, or_else)
    wait_until(lambda: server.processes().get(victim, old) != old, 20, f"a new {victim}")


def test_a_worker_killed_again_while_it_loads_and_a_janitor_cost_only_time(
    server: RunningServer, undisturbed: list[list[int]]
) -> None:
    janitor = server.processes()["janitor-0"]

    def twice() -> None:
        send(server, "janitor-0")
        old = send(server, "worker-0")
        wait_until(lambda: server.processes().get("worker-0", old) != old, 20, "a new worker")
        send(server, "worker-0")

    survives(server, undisturbed, twice)
    wait_until(lambda: server.processes().get("janitor-0", janitor) != janitor, 20, "a new janitor")


def test_everything_but_the_launcher_can_die_at_once(
    server: RunningServer, undisturbed: list[list[int]]
) -> None:
    def all_of_them() -> None:
        # The frontend first: nobody can tell it of the others.
        for _, pid in sorted(server.processes().items()):
            with contextlib.suppress(ProcessLookupError):  # the launcher was quicker
                os.kill(pid, signal.SIGKILL)

    survives(server, undisturbed, all_of_them, "broken")


def test_a_stopped_scheduler_is_found_by_its_silence(
    server: RunningServer, undisturbed: list[list[int]]
) -> None:
    survives(
        server,
        undisturbed,
        lambda: send(server, "scheduler-0", signal.SIGSTOP) and None,
        "error",
    )
    assert "lost scheduler 0" in server.log.read_text()


def test_a_lost_rank_takes_its_group_along_and_a_lost_launcher_everything(
    tiny_model: Path, tmp_path: Path, undisturbed: list[list[int]]
) -> None:
    flags = ("--data_type", "float32", "--tp", "2", "--step_timeout_s", str(STEP_TIMEOUT_S))
    with running_server(tiny_model, tmp_path, *flags) as server:
        assert reachable(server) == ({server.port}, []), "nothing but HTTP"
        survives(server, undisturbed, lambda: send(server, "worker-1") and None)
        survives(server, undisturbed, lambda: send(server, "worker-1", signal.SIGSTOP) and None)
        losses = [line for line in server.log.read_text().splitlines() if "lost worker" in line]
        assert "lost worker 1" in losses[0]
        assert "killed by SIGKILL" in losses[0]
        assert "a step took longer" in losses[-1]
        # In between, rank 0 may have ended by itself before it was killed: still one restart.
        wait_until(
            lambda: server.log.read_text().count("the engine is ready again") == 2, 10, "2 restarts"
        )

        pids = list(server.processes().values())
        endings = asyncio.run(during_streams(server, server.launcher.kill))
        assert all(ending in ("broken", "error") for ending in endings)
        server.launcher.wait()
        wait_until(lambda: not any(map(psutil.pid_exists, pids)), 10, "all processes gone")
        wait_until(lambda: not server.runtime_dir.exists(), 10, "runtime directory gone")
        assert server.get("/health")[0] == 0


def test_streams_end_with_an_error_when_other_weights_are_on_the_disk(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    shards = sorted(model.glob("*.safetensors"))
    lines = [f"{hashlib.sha256(shard.read_bytes()).hexdigest()}  {shard.name}" for shard in shards]
    (model / "SHA256SUMS").write_text("\n".join(lines))

    def replace_weights() -> None:
        with shards[0].open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(b"\1" * 1000)
        send(server, "worker-0")

    with running_server(
        model, tmp_path / "s", "--data_type", "float32", "--verify_checksums"
    ) as server:
        assert f"{len(shards)} checksums are right" in server.log.read_text()
        endings = asyncio.run(during_streams(server, replace_weights))
        assert endings == ["error"] * STREAMS
        assert server.launcher.wait(30) == 4
        log = server.log.read_text()
    assert f"the model changed on disk while the server ran: {shards[0].name}" in log
