"""Mixed traffic for a long time: faults in the first part, then a look at what grows.

Some of the requests have known tokens. Memory is followed for each process that lives through the
second part; its slope is that of a straight line through the samples.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from typing import Any

import aiohttp
import psutil
from pressure.watch import MemoryWatch, Row
from server import RunningServer, wait_until

MAX_PROMPT = 700
CONCURRENCY = 32
_HUNG_S = 150.0
_FAULT_EVERY_S = 40.0
_FAULTS_SHARE = 0.4  # of the time; the rest is quiet
_SETTLE_SHARE = 0.5  # samples before this share of the time do not count for slopes
_KNOWN = [[number + 1] * 30 for number in range(8)]  # prompts
_KNOWN_TOKENS = 40


def random_request(rng: random.Random, prefixes: list[list[int]]) -> tuple[str, dict[str, Any]]:
    """Route and body of one request."""
    prompt = rng.choice(prefixes) if rng.random() < 0.6 else []
    length = rng.choice((1, 3, 40, rng.randrange(1, MAX_PROMPT)))
    prompt = (prompt + [rng.randrange(400) for _ in range(length)])[:MAX_PROMPT]
    tokens = rng.choice((1, 5, 30, rng.randrange(1, 120)))
    if rng.random() < 0.5:
        parameters: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": rng.random() < 0.7}
        if rng.random() < 0.4:
            parameters |= {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20}
        if rng.random() < 0.2:
            parameters |= {"frequency_penalty": 0.5, "repetition_penalty": 1.2}
        route = rng.choice(("/generate", "/generate_stream"))
        return route, {"inputs": prompt, "parameters": parameters}
    body = {"model": "x", "max_tokens": tokens, "stream": rng.random() < 0.5}
    if rng.random() < 0.5:
        return "/v1/completions", {**body, "prompt": prompt}
    words = " ".join(rng.choice(("what", "is", "this", "model", "Hello")) for _ in range(length))
    n = rng.choice((1, 1, 2))
    return "/v1/chat/completions", {
        **body,
        "n": n,
        "messages": [{"role": "user", "content": words[:1500]}],
    }


class Soak:
    """Traffic on one server. `allows_errors` while faults happen."""

    def __init__(self, server: RunningServer, seed: int) -> None:
        self._server, self._seed = server, seed
        self.endings: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._oracle: list[list[int]] = []

    async def run(self, seconds: float) -> None:
        """Send requests, so many at a time, until the time is over and all have ended."""
        parameters = {"max_new_tokens": _KNOWN_TOKENS, "ignore_eos": True}
        for prompt in _KNOWN:
            ids = await asyncio.to_thread(self._server.token_ids, prompt, **parameters)
            self._oracle.append(ids)
        deadline = time.monotonic() + seconds
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=_HUNG_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            faults = asyncio.create_task(self._cause_faults(seconds * _FAULTS_SHARE))
            clients = (self._client(session, number, deadline) for number in range(CONCURRENCY))
            await asyncio.gather(*clients)
            await faults

    async def _client(self, session: aiohttp.ClientSession, number: int, deadline: float) -> None:
        rng = random.Random(self._seed * CONCURRENCY + number)
        prefixes = [[rng.randrange(400) for _ in range(rng.randrange(64, 400))] for _ in range(5)]
        while time.monotonic() < deadline:
            try:
                if rng.random() < 0.2:
                    ending = await self._known(session, rng.randrange(len(_KNOWN)))
                else:
                    patience = rng.random() * 0.4 if rng.random() < 0.3 else None
                    ending = await self._any(session, *random_request(rng, prefixes), patience)
            except TimeoutError:
                ending = "hung"
            except (aiohttp.ClientError, OSError):
                ending = "broken"
                await asyncio.sleep(0.2)
            self.endings[ending] += 1

    async def _known(self, session: aiohttp.ClientSession, number: int) -> str:
        parameters = {"max_new_tokens": _KNOWN_TOKENS, "ignore_eos": True, "return_details": True}
        body = {"inputs": _KNOWN[number], "parameters": parameters}
        async with session.post(self._server.url + "/generate", json=body) as reply:
            answer = await reply.json(content_type=None)
            if reply.status != 200:
                return f"status {reply.status}"
            ids = [token["id"] for token in answer["tokens"]]
            return "right" if ids == self._oracle[number] else "wrong"

    async def _any(
        self,
        session: aiohttp.ClientSession,
        route: str,
        body: dict[str, Any],
        patience: float | None,
    ) -> str:
        """A request that is read to its end, or left after `patience` seconds."""
        try:
            async with (
                asyncio.timeout(patience),
                session.post(self._server.url + route, json=body) as reply,
            ):
                text = await reply.text()
        except TimeoutError:
            if patience is None:
                raise
            return "left"
        if reply.status != 200:
            return f"status {reply.status}"
        if reply.content_type != "text/event-stream":
            json.loads(text)
            return "answered"
        last = text.rstrip().rpartition("data:")[2]
        is_whole = "[DONE]" in last or '"finished":true' in last.replace(" ", "")
        return "streamed" if is_whole else "ended with an error"

    async def _cause_faults(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        rng = random.Random(self._seed)
        await asyncio.sleep(_FAULT_EVERY_S / 4)
        while time.monotonic() + _FAULT_EVERY_S < deadline:
            processes = sorted(self._server.processes().items())
            name, pid = rng.choice([p for p in processes if not p[0].startswith("janitor")])
            number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
            if name.startswith("frontend"):  # a stopped one would answer no probe
                number = signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                self.faults[f"{name} {number.name}"] += 1
            await asyncio.sleep(_FAULT_EVERY_S)


def soak(server: RunningServer, seconds: float, row: Row, seed: int = 1) -> None:
    """Run it and write what happened to `row`."""
    memory = MemoryWatch(server)
    memory.start()
    files = {name: _num_files(pid) for name, pid in server.processes().items()}
    started = time.monotonic()
    run = Soak(server, seed)
    asyncio.run(run.run(seconds))
    memory.end()
    wait_until(server.is_ready, 60, "ready after the soak")
    row.n, row.hung = run.endings.total(), run.endings["hung"]
    row.notes.append(", ".join(f"{n} {ending}" for ending, n in sorted(run.endings.items())))
    faults = ", ".join(f"{n} {fault}" for fault, n in sorted(run.faults.items()))
    row.notes.append(f"faults: {faults or 'none'}")
    slopes = _slopes(memory, started + seconds * _SETTLE_SHARE, server.processes())
    row.notes.append("RSS slope MB/min: " + ", ".join(f"{k} {v:.2f}" for k, v in slopes.items()))
    after = {name: _num_files(pid) for name, pid in server.processes().items()}
    growth = {name: after[name] - files[name] for name in sorted(files) if name in after}
    row.notes.append("open files: " + ", ".join(f"{k} {v:+d}" for k, v in growth.items()))
    for problem, count in (("wrong tokens", run.endings["wrong"]), ("hung clients", row.hung)):
        if count:
            row.problems.append(f"{count} {problem}")
    if "Traceback" in server.log.read_text():
        row.problems.append("a traceback in the log")


def _num_files(pid: int) -> int:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).num_fds()
    return 0


def _slopes(memory: MemoryWatch, since: float, now: dict[str, int]) -> dict[str, float]:
    """MB a minute, of the processes that live now."""
    slopes = {}
    for (name, pid), samples in sorted(memory.samples.items()):
        late = [(at / 60, mb) for at, mb in samples if at >= since]
        if len(late) > 2 and now.get(name, pid) == pid:
            slopes[name] = statistics.linear_regression(*zip(*late, strict=True)).slope
    return slopes
