"""Sends the requests at a given rate, with a limit on how many run at a time, or both."""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from .client import clock
from .metrics import Run
from .prompts import Prompt
from .stream import Outcome

Send = Callable[[Prompt], Awaitable[Outcome]]


def arrivals(number: int, rate: float | None, seed: int) -> list[float]:
    """The time at which each request is sent, in seconds from the start; without a rate all are
    sent at once. The gaps are those of a Poisson process. As in vLLM they are scaled to a sum of
    number / rate seconds, so that runs with different seeds have the same load."""
    if rate is None:
        return [0.0] * number
    rng = random.Random(f"{seed} arrivals")
    times = list(itertools.accumulate(rng.expovariate(rate) for _ in range(number)))
    scale = number / rate / times[-1]
    return [t * scale for t in times]


async def run_load(
    prompts: Sequence[Prompt],
    send: Send,
    times_s: Sequence[float],
    concurrency: int | None,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> Run:
    """Send each prompt at its time. While `concurrency` requests are running, later prompts wait;
    the time of a request begins when it is sent."""
    turn = asyncio.Semaphore(concurrency or len(prompts))
    running = most = 0

    async def send_one(prompt: Prompt) -> Outcome:
        nonlocal running, most
        async with turn:
            running += 1
            most = max(most, running)
            outcome = await send(prompt)
            running -= 1
        on_done(outcome)
        return outcome

    start_s, start_cpu_s = clock(), time.process_time()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for prompt, at_s in zip(prompts, times_s, strict=True):
            wait_s = start_s + at_s - clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(send_one(prompt)))
    outcomes = [task.result() for task in tasks]
    return Run(outcomes, clock() - start_s, time.process_time() - start_cpu_s, most)
