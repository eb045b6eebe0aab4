"""Random traffic with aborts and disconnects: every request gets one ending, nothing leaks.

`pytest tests/e2e/test_soak.py --soak 1000 -s` is the long run.
"""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path

import aiohttp
import psutil
import pytest
from pressure.soak import random_request
from server import RunningServer, running_server, wait_until

CONCURRENCY = 48


async def one_request(
    session: aiohttp.ClientSession, url: str, rng: random.Random, prefixes: list[list[int]]
) -> str:
    """Send it, read all of it or leave at a random moment; returns how it ended."""
    route, body = random_request(rng, prefixes)
    patience = rng.random() * 0.4 if rng.random() < 0.3 else None
    streams = route == "/generate_stream" or body.get("stream", False)
    try:
        async with asyncio.timeout(patience), session.post(url + route, json=body) as reply:
            text = await reply.text()
    except TimeoutError:
        return "left"
    assert reply.status == 200, (reply.status, text)
    if not streams:
        json.loads(text)
        return "answered"
    events = [line for line in text.split("\n") if line.startswith("data:")]
    if route == "/generate_stream":
        finished = [json.loads(event[5:])["finished"] for event in events]
        assert finished[-1], text[-300:]
        assert not any(finished[:-1]), text[-300:]
    else:
        assert events[-1] == "data: [DONE]"
        reasons = [
            choice["finish_reason"]
            for event in events[:-1]
            for choice in json.loads(event[6:])["choices"]
            if choice["finish_reason"]
        ]
        assert len(reasons) == body.get("n", 1), text[-300:]
    return "streamed"


async def soak(server: RunningServer, requests: int, seed: int) -> Counter[str]:
    """Run `requests` of them, a bounded number at a time; counts the endings."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(400) for _ in range(rng.randrange(64, 400))] for _ in range(5)]
    gate = asyncio.Semaphore(CONCURRENCY)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=240)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def gated(i: int) -> str:
            async with gate:
                return await one_request(session, server.url, random.Random(seed + i), prefixes)

        return Counter(await asyncio.gather(*(gated(i) for i in range(requests))))


def memory_mb(server: RunningServer) -> dict[str, float]:
    """Resident memory by process."""
    return {
        name: psutil.Process(pid).memory_info().rss / 2**20
        for name, pid in server.processes().items()
    }


def check_all_is_free(server: RunningServer) -> None:
    wait_until(lambda: server.metric("lightllm_num_running_reqs") == 0, 20, "nothing runs")
    wait_until(
        lambda: (
            server.metric("glimmer_pages_free") + server.metric("glimmer_pages_cached")
            == server.metric("glimmer_pages")
        ),
        5,
        "every page is free or only cached",
    )
    assert json.loads(server.get("/token_load")[1])["current_load"] == 0


def test_random_traffic_leaves_nothing_behind(
    tiny_model: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    requests = pytestconfig.getoption("--soak")
    # float32: in bfloat16 the CPU library keeps compiled kernels for up to 1,024 matrix shapes
    flags = ("--data_type", "float32", "--max_total_token_num", "8192")
    flags += ("--running_max_req_size", "32")
    with running_server(tiny_model, tmp_path, *flags) as server:
        asyncio.run(soak(server, min(requests, 200), seed=1))
        check_all_is_free(server)
        pids, before = server.processes(), memory_mb(server)
        endings = asyncio.run(soak(server, requests, seed=2))
        assert endings.total() == requests
        check_all_is_free(server)
        assert server.processes() == pids, "a process died and was replaced"
        after = memory_mb(server)
        growth = {name: round(after[name] - before[name], 1) for name in before}
        preemptions = server.metric("glimmer_preemptions_total")
        print(f"\n{requests} requests: {dict(endings)}, {preemptions:.0f} preemptions so far")
        print(f"memory growth in MB: {growth}")
        assert all(mb < 32 for mb in growth.values()), growth
        assert "Traceback" not in server.log.read_text()
