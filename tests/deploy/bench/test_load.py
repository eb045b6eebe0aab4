"""Requests go out when they should, and no more at once than they should."""

import asyncio
import statistics

import pytest
from glimmer.deploy.bench.client import clock
from glimmer.deploy.bench.load import arrivals, run_load
from glimmer.deploy.bench.prompts import Prompt
from glimmer.deploy.bench.stream import Outcome

PROMPTS = [Prompt([i], 1, 1) for i in range(20)]


class Sender:
    """Takes each prompt, answers when others had their turn."""

    def __init__(self) -> None:
        self.sent: list[object] = []

    async def __call__(self, prompt: Prompt) -> Outcome:
        self.sent.append(prompt.content)
        outcome = Outcome(clock(), 1, 1)
        for _ in range(3):
            await asyncio.sleep(0)
        return outcome


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (7, 7), (None, 20), (99, 20)])
async def test_so_many_run_at_once(concurrency: int | None, most: int) -> None:
    sender = Sender()
    done: list[Outcome] = []
    run = await run_load(PROMPTS, sender, [0.0] * 20, concurrency, done.append)
    assert run.max_running == most
    assert sender.sent == [p.content for p in PROMPTS]
    assert sorted(o.start_s for o in run.outcomes) == sorted(o.start_s for o in done)
    assert run.duration_s > 0


async def test_none_is_sent_before_its_time() -> None:
    start_s = clock()
    times_s = [0.0, 0.02, 0.04]
    run = await run_load(PROMPTS[:3], Sender(), times_s, None)
    for outcome, at_s in zip(run.outcomes, times_s, strict=True):
        assert outcome.start_s - start_s >= at_s
    assert run.duration_s >= 0.04


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    times = arrivals(2000, 50.0, seed=1)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(40)  # 2000 / 50, whatever the seed
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert statistics.pstdev(gaps) == pytest.approx(1 / 50, rel=0.1)  # exponential: as the mean
    assert times == arrivals(2000, 50.0, seed=1)
    assert times != arrivals(2000, 50.0, seed=2)


def test_without_a_rate_all_come_at_once() -> None:
    assert arrivals(3, None, seed=1) == [0, 0, 0]
