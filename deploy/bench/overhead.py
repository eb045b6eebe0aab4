"""`glimmer bench overhead`: the whole server with a worker that takes no time.

Streams N requests at a time through real HTTP, frontend, scheduler and sockets, and prints the time
of a scheduler step and of a streamed token without a model. The load generator shares the cores
with the server, so it only counts events in raw bytes. `--route` chooses /generate_stream, the chat
route, or the chat route with reasoning and tool calls parsed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...shared.errors import StartError
from ..demo.checkpoint import make_checkpoint
from .report import report, write_report

_EVENT = b"data:"
_END = b"data: [DONE]\n\n"
_ROUTES = ("generate", "chat", "chat-parsed")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Result:
    """One row of the table. CPU is a share of one core per process."""

    running: int
    tokens: int
    seconds: float
    steps: float
    step_us: float
    cpu: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second that reached the clients."""
        return self.tokens / self.seconds

    @property
    def frontend_us(self) -> float:
        """CPU time of the frontend per token, in us."""
        return self.cpu.get("frontend", 0.0) / self.tokens_per_s * 1e6


@dataclass(frozen=True)
class Load:
    """The load on one server, whose launcher has process id `server`."""

    server: int
    port: int
    route: str

    async def run(self, running: int, tokens: int) -> None:
        """Stream `running` requests of `tokens` tokens each, all at once. Raises StartError if a
        stream breaks off."""
        await asyncio.gather(*(self._stream(i, tokens) for i in range(running)))

    async def _stream(self, number: int, tokens: int) -> None:
        path, body = self._request(number, tokens)
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        events = 0
        tail = b""  # may hold the beginning of an event mark
        end = b""  # the last bytes of the stream
        while received := await reader.read(1 << 16):
            tail += received
            events += tail.count(_EVENT)
            end = (end + received)[-64:]
            tail = tail[-len(_EVENT) + 1 :]
        writer.close()
        is_whole = events == tokens if self.route == "generate" else _END in end
        if not is_whole:
            raise StartError(f"a stream of {tokens} tokens broke off after {events} events")

    def _request(self, number: int, tokens: int) -> tuple[str, dict[str, Any]]:
        if self.route == "generate":
            prompt = [100 + (number * 7 + i) % 100 for i in range(16)]
            limits = {"max_new_tokens": tokens, "ignore_eos": True}
            return "/generate_stream", {"inputs": prompt, "parameters": limits}
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": f"question {number}"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
        if self.route == "chat-parsed":
            parameters = {"type": "object", "properties": {"name": {"type": "string"}}}
            function = {"name": "call", "parameters": parameters}
            body["tools"] = [{"type": "function", "function": function}]
        return "/v1/chat/completions", body


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print the table (and JSON with --output)."""
    parser = argparse.ArgumentParser(prog="glimmer bench overhead", description=__doc__)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 32, 256, 512])
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="approximate time per row of the table"
    )
    parser.add_argument("--route", choices=_ROUTES, default="generate")
    parser.add_argument("--port", type=int, default=8999)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    args = parser.parse_args(argv)
    flags = ["--reasoning_parser", "glm45"] if args.route == "chat-parsed" else []
    with (
        tempfile.TemporaryDirectory() as directory,
        serving(Path(directory), args.port, flags) as server,
    ):
        load = Load(server, args.port, args.route)
        results = []
        for running in args.running:
            rough_tokens = max(8, 2000 // running)
            tokens_per_s = running * rough_tokens / _run(load, running, rough_tokens)
            tokens = int(max(16, min(4000, tokens_per_s * args.seconds / running)))
            results.append(_measure(load, running, tokens))
    _print(results, args.route)
    if args.output:
        rows = [{**vars(r), "tokens_per_s": r.tokens_per_s} for r in results]
        settings = {"route": args.route, "seconds": args.seconds}
        words = sys.argv[1:] if argv is None else argv
        write_report(args.output, report("overhead", words, settings, rows))
    return 0


@contextlib.contextmanager
def serving(directory: Path, port: int, flags: list[str]) -> Iterator[int]:
    """Start the server with the fake worker. Yields the launcher's process id once it is ready."""
    make_checkpoint(directory)
    command = [sys.executable, "-m", __package__ + ".fake_server", "--model_dir", str(directory)]
    command += ["--port", str(port), "--running_max_req_size", "512", "--log_level", "warning"]
    command += flags
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not _is_ready(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise StartError(f"the server for the benchmark did not start on port {port}")
            time.sleep(0.1)
        yield server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def _is_ready(port: int) -> bool:
    try:
        return bool(_get(port, "/readiness"))
    except OSError:
        return False


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
        return str(reply.read().decode())


def _measure(load: Load, running: int, tokens: int) -> Result:
    """Measure one load, once its counters are up to date."""
    time.sleep(1.1)  # the counters arrive with the scheduler's heartbeat, once a second
    steps_before, planning_before = _counters(load.port)
    cpu_before = _cpu_seconds(load.server)
    seconds = _run(load, running, tokens)
    cpu_after = _cpu_seconds(load.server)
    time.sleep(1.1)
    steps_after, planning_after = _counters(load.port)
    steps = steps_after - steps_before
    cpu = {role: (used - cpu_before.get(role, 0.0)) / seconds for role, used in cpu_after.items()}
    step_us = (planning_after - planning_before) / max(steps, 1) * 1e6
    return Result(running, running * tokens, seconds, steps, step_us, cpu)


def _run(load: Load, running: int, tokens: int) -> float:
    """Seconds that a load takes."""
    start = time.monotonic()
    asyncio.run(load.run(running, tokens))
    return time.monotonic() - start


def _counters(port: int) -> tuple[float, float]:
    """Number of steps so far, and the seconds spent planning them."""
    text = _get(port, "/metrics")

    def value(name: str) -> float:
        match = re.search(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M)
        if match is None:
            raise StartError(f"/metrics has no {name}")
        return float(match[1])

    steps = value("glimmer_steps_total")
    return steps, steps * value("glimmer_schedule_seconds")


def _cpu_seconds(server: int) -> dict[str, float]:
    """CPU seconds so far of this process and of the server's processes, by role."""
    seconds = {"client": time.process_time()}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) != server:
                continue
            command = stat.with_name("cmdline").read_bytes().decode().split("\0")
            module = next((a for a in command if a.startswith("glimmer.")), "other")
            role = module.removeprefix("glimmer.").removeprefix("deploy.bench.").split(".")[-1]
            used = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
            seconds[role] = seconds.get(role, 0.0) + used
    return seconds


def _print(results: list[Result], route: str) -> None:
    title = f"{route}: overhead with a worker that takes no time, {os.cpu_count()} cores"
    table = Table(title=title)
    columns = "running", "tokens/s", "steps/s", "scheduler us/step", "frontend us/token"
    for column in (*columns, "CPU by process"):
        table.add_column(column, justify="right")
    for r in results:
        cpu = sorted(r.cpu.items(), key=lambda item: -item[1])
        table.add_row(
            str(r.running),
            f"{r.tokens_per_s:,.0f}",
            f"{r.steps / r.seconds:,.0f}",
            f"{r.step_us:,.0f}",
            f"{r.frontend_us:,.0f}",
            " ".join(f"{role} {share:.0%}" for role, share in cpu if share >= 0.01),
        )
    Console(width=120).print(table)
