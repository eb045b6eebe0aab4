"""The guide's scripts as they are, and how a server with open streams stops."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from glimmer.deploy.demo.checkpoint import make_checkpoint
from server import RunningServer, free_port, running_server, wait_until

STREAMS = 5
GUIDE = """--model_dir {model}/ --tp 1 --max_req_total_len 202752 --chunked_prefill_size 8192
    --llm_prefill_att_backend fa3 --llm_decode_att_backend flashinfer --graph_max_batch_size 512
    --tool_call_parser glm47 --reasoning_parser glm45 --host 0.0.0.0 --port {port}"""
MODULE = "glimmer.server.api_server"  # the guide's name with one word changed
GUIDE_MTP = " --mtp_step 4 --mtp_mode eagle_with_att --mtp_draft_model_dir {model}/"


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a short name: sockets lie below it."""
    return tmp_path_factory.mktemp("r")


async def stream(server: RunningServer, tokens: int, started: asyncio.Event) -> str:
    """One stream; returns how it ended."""
    body = {"inputs": "x", "parameters": {"max_new_tokens": tokens, "ignore_eos": True}}
    async with (
        aiohttp.ClientSession() as session,
        session.post(server.url + "/generate_stream", json=body) as reply,
    ):
        event: dict[str, Any] = {}
        async for line in reply.content:
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                started.set()
    return "done" if event.get("finished") else "error" if "error" in event else "broken"


def late_status(server: RunningServer) -> int:
    """Of a request that comes while the server stops."""
    try:
        return server.post("/generate", {"inputs": "x"})[0]
    except urllib.error.URLError:
        return 0


async def stop_during_streams(
    server: RunningServer, tokens: int, stops: Sequence[Callable[[], None]]
) -> tuple[set[str], int]:
    """Start streams, stop the server once all run, in each of these ways; returns their endings,
    and the status of a request that came after the first stop, 0 if no connection was made."""
    started = [asyncio.Event() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(stream(server, tokens, event)) for event in started]
    await asyncio.gather(*(asyncio.wait_for(event.wait(), 60) for event in started))
    stops[0]()
    await asyncio.to_thread(
        wait_until, lambda: server.get("/readiness")[0] != 200, 10, "no longer ready"
    )
    late = await asyncio.to_thread(late_status, server)
    for stop in stops[1:]:
        stop()
    return set(await asyncio.wait_for(asyncio.gather(*tasks), 60)), late


def serve_by_script(tmp_path: Path, script: str, output: str) -> RunningServer:
    """Run a guide's script with a model of the real context length; waits until it is ready."""
    model, port = tmp_path / "GLM-4.7-Flash", free_port()
    make_checkpoint(model, max_position_embeddings=202752, num_hidden_layers=2)
    words = script.format(model=model, port=port).split()
    launcher = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {output}', "sh", sys.executable, "-m", MODULE, *words],
        env=os.environ | {"LOADWORKER": "18", "XDG_RUNTIME_DIR": str(tmp_path)},
        start_new_session=True,
    )
    server = RunningServer(launcher, port, tmp_path, tmp_path / "log")
    wait_until(lambda: launcher.poll() is not None or server.is_ready(), 90, "ready")
    return server


@pytest.mark.parametrize(
    ("script", "output", "signals", "expected"),
    [
        (GUIDE, ">/dev/full 2>/dev/full", 1, "done"),  # a full disk is no reason to stop
        (GUIDE + GUIDE_MTP, "<&- >&- 2>&-", 2, "error"),
    ],
    ids=["plain, drained by Ctrl-C", "mtp, stopped at once by a second Ctrl-C"],
)
def test_the_guides_scripts_serve_and_stop_with_nowhere_to_write(
    tmp_path: Path, script: str, output: str, signals: int, expected: str
) -> None:
    server = serve_by_script(tmp_path, script, output)
    try:
        (settled,) = tmp_path.glob("glimmer-*/config.json")
        assert json.loads(settled.read_text())["load_workers"] == 18
        penalty = {"max_new_tokens": 100, "frequency_penalty": 1}
        assert server.generate("What is AI?", **penalty)["count_output_tokens"] >= 1
        ask = {
            "model": "GLM-4.7-Flash",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 100,
        }
        assert server.post("/v1/chat/completions", ask)[0] == 200

        def ctrl_c() -> None:
            os.killpg(server.launcher.pid, signal.SIGINT)

        endings, late = asyncio.run(
            stop_during_streams(server, 400 if signals == 1 else 20_000, [ctrl_c] * signals)
        )
        assert endings == {expected}
        assert late in (0, 503)
        assert server.launcher.wait(30) == 0
        assert not list(tmp_path.glob("glimmer-*"))
    finally:
        server.launcher.kill()
        server.launcher.wait()


def test_streams_that_outlast_the_drain_end_with_an_error(tiny_model: Path, tmp_path: Path) -> None:
    with running_server(tiny_model, tmp_path, "--drain_timeout_s", "3") as server:
        stop = server.launcher.terminate
        endings, late = asyncio.run(stop_during_streams(server, 2000, [stop]))
        assert endings == {"error"}
        assert late in (0, 503)
        assert server.launcher.wait(30) == 0
        assert "Traceback" not in server.log.read_text()
