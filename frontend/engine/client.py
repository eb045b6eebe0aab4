"""The way to the scheduler and back: the only user of sockets to other processes here.

`EngineClient.submit` -> `Generation`, whose `receive` gives what the engine produced since the
last call. Every open sequence ends in one `Finished`: the scheduler's, or one made here when the
scheduler is lost. Knows nothing about text or HTTP.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...shared.errors import OverloadedError, UnavailableError
from ...shared.messages import (
    Abort,
    AbortNamed,
    AnyMessage,
    Finished,
    FlushCache,
    Grammar,
    Heartbeat,
    Hello,
    PeerLost,
    Ready,
    Shutdown,
    Submit,
    TokenLogprob,
    TokenRow,
    Tokens,
)
from ...shared.sampling import SamplingParams
from ...shared.transport import AsyncReceiver, Sender, frontend_address, scheduler_address
from .state import EngineState

RETRY_AFTER_S = 5.0  # told to clients while the engine restarts
_IDLE_S = 15.0  # `receive` returns empty-handed so often, so that streams can show life
logger = logging.getLogger(__name__)


@dataclass
class Event:
    """What one sequence produced since the last look. Later tokens join what nobody took yet."""

    index: int  # of the sequence in its Generation
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None


class Generation:
    """The open sequences of one HTTP request. A `with` block that ends early aborts them."""

    def __init__(self, client: "EngineClient", request_ids: list[int]) -> None:
        self.name = ""  # the X-Request-Id of its request
        self._client = client
        self._open = {request_id: index for index, request_id in enumerate(request_ids)}
        self._request_ids = request_ids
        self._pending: dict[int, Event] = {}
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is something to receive, now or later."""
        return bool(self._open or self._pending)

    async def receive(self) -> list[Event]:
        """All that came since the last call, at most one event per sequence; waits for it.
        Empty now and then, when nothing comes for long."""
        if not self._pending:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pending, self._pending = self._pending, {}
        return list(pending.values())

    def abort(self, index: int) -> None:
        """End one sequence; its `Finished` still comes."""
        if self._request_ids[index] in self._open:
            self._client.abort([self._request_ids[index]])

    def abort_all(self) -> None:
        """End all of its sequences; each `Finished` still comes."""
        self._client.abort(list(self._open))

    def push(self, row: TokenRow) -> None:
        """The client's: new tokens for one of the sequences."""
        event = self._event(row.request_id)
        event.token_ids += row.token_ids
        event.logprobs += row.logprobs
        event.prompt_logprobs += row.prompt_logprobs

    def finish(self, finished: Finished) -> None:
        """The client's: the end of one of the sequences."""
        self._event(finished.request_id).finished = finished
        del self._open[finished.request_id]

    def wake(self) -> None:
        """The client's: let `receive` return."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _event(self, request_id: int) -> Event:
        index = self._open[request_id]
        event = self._pending.get(index)
        if event is None:
            event = self._pending[index] = Event(index)
            self.wake()
        return event

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.forget(list(self._open))


class EngineClient:
    """This process's link to the scheduler. `run` must be running for anything to arrive."""

    def __init__(
        self,
        runtime_dir: str,
        index: int,
        hello: Hello,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.index = index
        self.state = EngineState()
        self._clock = clock
        self._hello = hello
        self._runtime_dir = runtime_dir
        self._receiver = AsyncReceiver.bind(frontend_address(runtime_dir, index))
        self._generations: dict[int, Generation] = {}  # by request id
        self._aborts: list[int] = []
        self._greet()

    @property
    def grammar_directory(self) -> Path:
        """Where this process keeps compiled grammars, which the worker reads."""
        return Path(self._runtime_dir) / f"grammars-{self.index}"

    @property
    def malformed(self) -> int:
        """Messages that were dropped because they could not be decoded."""
        return self._receiver.malformed

    @property
    def max_req_total_len(self) -> int:
        """Longest prompt + output in tokens, as the engine settled it."""
        if self.state.ready is None:
            raise UnavailableError(
                f"the engine is not ready: {self.state.why_not_ready()}",
                retry_after_s=RETRY_AFTER_S,
            )
        return self.state.ready.max_req_total_len

    async def run(self) -> None:
        """Handle messages until cancelled."""
        ticker = asyncio.create_task(self._tick())
        try:
            while True:
                for message in await self._receiver.receive_async():
                    self._handle(message)
        finally:
            ticker.cancel()
            self._receiver.close()
            self._sender.close()

    def submit(
        self,
        sequences: Iterable[tuple[list[int], SamplingParams]],
        use_prefix_cache: bool = True,
        cache_salt: str = "",
        grammar: Grammar | None = None,
    ) -> Generation:
        """Ask for one sequence per (prompt ids, sampling). Raises OverloadedError when the link
        is full."""
        sequences = list(sequences)
        request_ids = [random.getrandbits(62) for _ in sequences]
        generation = Generation(self, request_ids)
        dropped = self._sender.dropped
        for request_id, (prompt_ids, sampling) in zip(request_ids, sequences, strict=True):
            self._generations[request_id] = generation
            self._sender.send(
                Submit(
                    request_id,
                    self.index,
                    prompt_ids,
                    sampling,
                    use_prefix_cache,
                    cache_salt,
                    grammar=grammar,
                )
            )
        if self._sender.dropped != dropped:
            self.forget(request_ids)
            raise OverloadedError("too many requests on their way", retry_after_s=1.0)
        return generation

    def abort(self, request_ids: Sequence[int]) -> None:
        """End these; all that are aborted in one turn of the event loop go in one message."""
        if request_ids and not self._aborts:
            asyncio.get_running_loop().call_soon(self._send_aborts)
        self._aborts += request_ids

    def forget(self, request_ids: Sequence[int]) -> None:
        """Abort these and drop whatever still arrives for them."""
        for request_id in request_ids:
            del self._generations[request_id]
        self.abort(request_ids)

    def abort_named(self, name: str) -> None:
        """End what belongs to the HTTP request of this name, or everything if it is ""."""
        for generation in set(self._generations.values()):
            if not name or generation.name == name:
                generation.abort_all()

    def tell_others(self, num_frontends: int, name: str) -> None:
        """Have the other HTTP processes do the same."""
        for index in range(num_frontends):
            if index != self.index:
                sender = Sender.connect(frontend_address(self._runtime_dir, index))
                sender.send(AbortNamed(name))
                sender.close()

    def flush_cache(self) -> None:
        """Have the scheduler forget the prefixes that no running request uses."""
        self._sender.send(FlushCache())

    def fail_all(self, message: str) -> None:
        """End all open sequences with an error."""
        for request_id in list(self._generations):
            self._handle(
                Finished(request_id, "unavailable", message=message, retry_after_s=RETRY_AFTER_S)
            )

    def begin_shutdown(self, drain_s: float) -> None:
        """Refuse new requests; `state.shutdown_at` says when the open ones must have ended."""
        self.state.draining = True
        self.state.shutdown_at = min(self.state.shutdown_at, self._clock() + drain_s)
        self.state.shutdown.set()

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case Tokens(rows=rows):
                for row in rows:
                    generation = self._generations.get(row.request_id)
                    if generation is not None:  # else its client has just gone
                        generation.push(row)
            case Finished():
                generation = self._generations.pop(message.request_id, None)
                if generation is not None:
                    generation.finish(message)
            case AbortNamed(name=name):
                self.abort_named(name)
            case Heartbeat():
                self.state.on_heartbeat(message, self._clock())
            case Ready(role="scheduler"):
                self._on_ready(message)
            case PeerLost(role="scheduler", reason=reason):
                self._on_scheduler_lost(reason)
            case PeerLost():
                logger.warning("%s %d lost: %s", message.role, message.index, message.reason)
            case Shutdown(drain_s=drain_s):
                self.begin_shutdown(drain_s)
            case _:
                logger.error("unexpected message %s", type(message).__name__)

    def _on_ready(self, ready: Ready) -> None:
        if self.state.ready is None and ready.epoch <= self.state.last_epoch:
            return  # the lost scheduler's, overtaken by the news of its death
        if ready != self.state.ready:  # said twice to a frontend that greets just then
            logger.info("engine ready, epoch %d", ready.epoch)
        self.state.ready, self.state.last_epoch = ready, ready.epoch
        self.state.progress_at = self._clock()
        self.state.became_ready.set()

    def _on_scheduler_lost(self, reason: str) -> None:
        logger.error("scheduler lost: %s", reason)
        self.state.ready, self.state.heartbeat = None, None
        self.fail_all(f"the engine was lost: {reason}")
        self._aborts.clear()
        self._sender.close()
        self._greet()

    def _greet(self) -> None:
        self._sender = Sender.connect(scheduler_address(self._runtime_dir))
        self._sender.send(self._hello)

    def _send_aborts(self) -> None:
        if self._aborts:
            self._sender.send(Abort(self._aborts))
            self._aborts = []

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_IDLE_S)
            for generation in set(self._generations.values()):
                generation.wake()
