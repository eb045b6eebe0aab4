"""Who may use a thread for expensive work: clients take turns, however many requests each sends."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextvars import ContextVar
from typing import Generic, Protocol, TypeVar

from ...shared.errors import OverloadedError

# Whose request is being handled, if its body is large. None: it is small and never waits.
LARGE_FOR: ContextVar[str | None] = ContextVar("LARGE_FOR", default=None)
_LIMIT = 1024  # jobs that may wait
_LIMIT_PER_CLIENT = 512


class Worker(Protocol):
    """A job gets one, and runs on its thread."""

    thread: Executor


W = TypeVar("W", bound=Worker)
T = TypeVar("T")


class FairQueue(Generic[W]):
    """Runs jobs on a few workers. When one is free, the next client has it, not the next job."""

    def __init__(self, workers: Sequence[W]) -> None:
        self._free = list(workers)
        self._waiting: dict[str, deque[asyncio.Future[W]]] = {}  # the next client first

    async def run(self, client: str, job: Callable[[W], T]) -> T:
        """Run a job and return its result. Raises its errors, and OverloadedError when too many
        wait. If the caller is cancelled, its job still ends before another one has the worker."""
        worker = await self._take(client)
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(worker.thread, job, worker)

        def give_back(done: "asyncio.Future[T]") -> None:
            if not done.cancelled():
                done.exception()  # the caller may be gone
            self._give(worker)

        future.add_done_callback(give_back)
        return await asyncio.shield(future)

    async def _take(self, client: str) -> W:
        if self._free:
            return self._free.pop()
        num_own = len(self._waiting.get(client, ()))
        num_all = sum(map(len, self._waiting.values()))
        if num_own >= _LIMIT_PER_CLIENT or num_all >= _LIMIT:
            raise OverloadedError(f"{num_all} large requests wait to be prepared", None, 1.0)
        future: asyncio.Future[W] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._give(future.result())
            raise

    def _give(self, worker: W) -> None:
        while self._waiting:
            client = next(iter(self._waiting))
            futures = self._waiting.pop(client)
            future = futures.popleft()
            if futures:
                self._waiting[client] = futures  # after all others
            if not future.done():  # else its request was cancelled
                future.set_result(worker)
                return
        self._free.append(worker)
