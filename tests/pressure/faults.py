"""SIGKILL and SIGSTOP of each kind of process under streams whose tokens are known."""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from pressure.watch import Row, leaked_pages
from server import RunningServer, running_server, wait_until

KINDS = ("worker", "scheduler", "frontend", "launcher")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
CONFIGS = tuple((tp, frontends) for tp in (1, 2) for frontends in (1, 2))
STREAMS = 12
TOKENS = 100
_STARTED_S = 90.0  # for all streams to have their first token, on a busy machine
_HUNG_S = 120.0  # a stream that has not ended after so long has hung
_RECOVERY_S = 120.0
_STEP_TIMEOUT_S = "7"


@dataclass
class Outcome:
    """Sums over many faults."""

    faults: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)  # right, error, broken, wrong, hung
    orphans: int = 0
    leaked: float = 0.0
    recovery: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)


async def _stream(
    server: RunningServer, number: int, started: asyncio.Event
) -> tuple[str, list[int]]:
    """One request: how it ended (whole, error, broken, refused) and its tokens."""
    body = {
        "inputs": [number + 1] * 20,
        "parameters": {"max_new_tokens": TOKENS, "ignore_eos": True},
    }
    tokens: list[int] = []
    ending = "broken"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as session,
            session.post(server.url + "/generate_stream", json=body) as reply,
        ):
            if reply.status != 200:
                ending = "refused"
            async for line in reply.content:
                if line.startswith(b"data:"):
                    event = json.loads(line[5:])
                    if "error" in event:
                        ending = "error"
                    else:
                        tokens.append(event["token"]["id"])
                        ending = "whole" if event["finished"] else ending
                    started.set()
    except (aiohttp.ClientError, OSError):
        pass
    finally:
        started.set()
    return ending, tokens


async def _streams(
    server: RunningServer, act: Callable[[], None]
) -> list[tuple[str, list[int]] | None]:
    """Run the streams and `act` once all have begun. None: it hung."""
    started = [asyncio.Event() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(_stream(server, i, started[i])) for i in range(STREAMS)]
    async with asyncio.timeout(_STARTED_S):
        for event in started:
            await event.wait()
    await asyncio.to_thread(act)
    done, hung = await asyncio.wait(tasks, timeout=_HUNG_S)
    for task in hung:
        task.cancel()
    return [task.result() if task in done else None for task in tasks]


class Sweep:
    """Faults of one configuration: `--tp tp` and so many HTTP processes."""

    def __init__(self, model: Path, directory: Path, tp: int, frontends: int) -> None:
        self.name = f"--tp {tp}, {frontends} HTTP"
        self.outcome = Outcome()
        self._model, self._directory, self._frontends = model, directory, frontends
        self._tp = tp
        self._flags = ("--data_type", "float32", "--tp", str(tp), "--log_level", "warning")
        self._flags += ("--httpserver_workers", str(frontends))
        self._flags += ("--step_timeout_s", _STEP_TIMEOUT_S, "--max_total_token_num", "16384")
        self._oracle: list[list[int]] = []

    def run(self, rounds: int, deadline: float) -> None:
        """So many rounds of all faults, as far as the time reaches. Never raises."""
        faults = [(kind, number) for number in SIGNALS for kind in KINDS]
        plan = [(r, kind, number) for r in range(rounds) for kind, number in faults]
        starts = 0
        while plan and time.monotonic() < deadline:
            starts += 1
            try:
                with running_server(
                    self._model, self._directory / str(starts), *self._flags
                ) as server:
                    self._serve(server, plan, deadline)
            except (Exception, AssertionError) as error:
                self.outcome.problems.append(
                    f"{self.name}: {type(error).__name__}: {str(error)[:300]}"
                )
                if starts > len(faults) * rounds:
                    return

    def _serve(
        self, server: RunningServer, plan: list[tuple[int, str, signal.Signals]], deadline: float
    ) -> None:
        """Faults on one server, until its launcher was killed."""
        if not self._oracle:
            endings = asyncio.run(_streams(server, lambda: None))
            assert all(e is not None and e[0] == "whole" for e in endings), "undisturbed streams"
            self._oracle = [ending[1] for ending in endings if ending is not None]
        while plan and time.monotonic() < deadline:
            number, kind, sig = plan.pop(0)
            self._one(server, number, kind, sig)
            if kind == "launcher" and sig is signal.SIGKILL:
                return

    def _one(self, server: RunningServer, number: int, kind: str, sig: signal.Signals) -> None:
        """One fault: the streams, then the way back, then what is left."""
        index = number % {"worker": self._tp, "frontend": self._frontends}.get(kind, 1)
        before = server.processes()
        pid = server.launcher.pid if kind == "launcher" else before[f"{kind}-{index}"]
        acted_at = 0.0

        def act() -> None:
            nonlocal acted_at
            acted_at = time.monotonic()
            os.kill(pid, sig)
            if kind == "launcher" and sig is signal.SIGSTOP:
                try:
                    wait_until(lambda: server.get("/health")[0] == 503, 40, "a stop is noticed")
                finally:
                    os.kill(pid, signal.SIGCONT)

        may_break = kind in ("frontend", "scheduler") or (kind, sig) == (
            "launcher",
            signal.SIGKILL,
        )
        for stream, result in enumerate(asyncio.run(_streams(server, act))):
            self.outcome.endings[self._judge(stream, result, may_break)] += 1
        fault = f"{kind} {sig.name}"
        self.outcome.faults[fault] += 1
        if kind == "launcher" and sig is signal.SIGKILL:
            self._after_the_launcher(server, before)
            return
        wait_until(lambda: self._is_back(server, kind, index, pid), _RECOVERY_S, f"back: {fault}")
        prompt = [STREAMS] * 20
        assert server.token_ids(prompt, max_new_tokens=9, ignore_eos=True) == self._oracle[-1][:9]
        self.outcome.recovery[fault].append(time.monotonic() - acted_at)
        row = Row(fault)
        self.outcome.leaked += leaked_pages(server, row)
        self.outcome.problems += row.problems
        if kind != "launcher":
            self.outcome.orphans += psutil.pid_exists(pid)

    def _is_back(self, server: RunningServer, kind: str, index: int, old: int) -> bool:
        if kind == "launcher":
            return server.get("/health")[0] == 200
        names = {f"worker-{n}" for n in range(self._tp)} | {"scheduler-0"}
        names |= {f"frontend-{n}" for n in range(self._frontends)}
        processes = server.processes()
        is_new = processes.get(f"{kind}-{index}", old) != old
        return is_new and names <= set(processes) and server.is_ready()

    def _after_the_launcher(self, server: RunningServer, before: dict[str, int]) -> None:
        server.launcher.wait()
        with contextlib.suppress(AssertionError):
            pids = list(before.values())
            wait_until(lambda: not any(map(psutil.pid_exists, pids)), 15, "all gone")
        self.outcome.orphans += sum(map(psutil.pid_exists, before.values()))

    def _judge(self, number: int, result: tuple[str, list[int]] | None, may_break: bool) -> str:
        """What became of a stream. Tokens before a break must be right, too."""
        if result is None:
            return "hung"
        ending, tokens = result
        if tokens != self._oracle[number][: len(tokens)]:
            return "wrong"
        if ending == "whole":
            return "right" if len(tokens) == TOKENS else "wrong"
        if not may_break:
            self.outcome.problems.append(f"{self.name}: a stream ended with {ending}")
        return ending


def sweep(model: Path, directory: Path, seconds: float, rounds: int = 5, jobs: int = 4) -> Row:
    """All configurations, `jobs` at a time: most of the time is spent waiting for a stop to be
    noticed. With 5 rounds, each fault happens 20 times."""
    started = time.monotonic()
    sweeps = [Sweep(model, directory / f"{tp}{n}", tp, n) for tp, n in CONFIGS]
    lanes = [sweeps[n::jobs] for n in range(jobs)]

    def run(lane: list[Sweep]) -> None:
        for done, one in enumerate(lane, 1):
            one.run(rounds, started + seconds * done / len(lane))

    threads = [threading.Thread(target=run, args=(lane,)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _row([one.outcome for one in sweeps])


def _row(outcomes: list[Outcome]) -> Row:
    faults: Counter[str] = sum((o.faults for o in outcomes), Counter())
    endings: Counter[str] = sum((o.endings for o in outcomes), Counter())
    row = Row("faults", faults.total(), endings["hung"], sum(o.leaked for o in outcomes))
    orphans = sum(outcome.orphans for outcome in outcomes)
    row.problems = [problem for outcome in outcomes for problem in outcome.problems]
    for problem, count in (("wrong tokens", endings["wrong"]), ("orphans", orphans)):
        if count:
            row.problems.append(f"{count} {problem}")
    if row.hung:
        row.problems.append(f"{row.hung} hung clients")
    if row.leaked_pages:
        row.problems.append("pages leaked")
    row.notes = [f"{endings['wrong']} wrong tokens, {orphans} orphans"]
    row.notes.append("streams: " + ", ".join(f"{n} {how}" for how, n in sorted(endings.items())))
    for fault, count in sorted(faults.items()):
        times = [t for outcome in outcomes for t in outcome.recovery.get(fault, [])]
        text = f", back after {statistics.median(times):.0f} ({max(times):.0f}) s" if times else ""
        row.notes.append(f"{fault} {count}{text}")
    return row
