"""Clients take turns at expensive work, and none can fill the queue."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from glimmer.frontend.text import fair_queue
from glimmer.frontend.text.fair_queue import FairQueue
from glimmer.shared.errors import OverloadedError


@dataclass
class OneThread:
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))


async def hold(queue: FairQueue[OneThread]) -> tuple[threading.Event, "asyncio.Task[bool]"]:
    """Occupy a worker until the event is set."""
    event, started = threading.Event(), threading.Event()

    def job(_: OneThread) -> bool:
        started.set()
        return event.wait(10)

    task = asyncio.create_task(queue.run("holder", job))
    await asyncio.to_thread(started.wait, 10)
    return event, task


async def test_the_next_client_is_served_and_not_the_next_job() -> None:
    queue = FairQueue([OneThread()])
    event, holder = await hold(queue)
    order: list[str] = []
    jobs = []
    for client in ("greedy", "greedy", "greedy", "modest", "other"):
        jobs.append(queue.run(client, lambda _, client=client: order.append(client)))
    running = asyncio.gather(*jobs)
    await asyncio.sleep(0)
    event.set()
    await asyncio.gather(holder, running)
    assert order == ["greedy", "modest", "other", "greedy", "greedy"]


async def test_the_queue_is_bounded_in_all_and_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "_LIMIT", 5)
    monkeypatch.setattr(fair_queue, "_LIMIT_PER_CLIENT", 3)
    queue = FairQueue([OneThread()])
    event, holder = await hold(queue)
    clients = ["greedy"] * 3 + ["modest"] * 2
    waiting = [asyncio.create_task(queue.run(client, lambda _: 1)) for client in clients]
    await asyncio.sleep(0)
    for client in ("greedy", "third"):
        with pytest.raises(OverloadedError):
            await queue.run(client, lambda _: 1)
    event.set()
    assert sum(await asyncio.gather(*waiting)) == 5
    assert await holder


async def test_clients_that_leave_neither_lose_nor_free_a_worker_early() -> None:
    queue = FairQueue([OneThread()])
    event, holder = await hold(queue)
    waiting = asyncio.create_task(queue.run("gone", lambda _: 1))
    await asyncio.sleep(0)
    waiting.cancel()
    holder.cancel()
    await asyncio.gather(waiting, holder, return_exceptions=True)
    later = asyncio.create_task(queue.run("next", lambda _: 2))
    await asyncio.sleep(0.05)
    assert not later.done(), "the thread still works for the one that has gone"
    event.set()
    assert await later == 2


async def test_errors_reach_the_caller_and_free_the_worker() -> None:
    queue = FairQueue([OneThread()])

    def fail(_: OneThread) -> None:
        raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            await queue.run("a", fail)
    assert await queue.run("a", lambda _: 3) == 3
