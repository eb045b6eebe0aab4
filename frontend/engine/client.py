"""The link to the scheduler: the only user of sockets to other processes in this tier.

`EngineClient.submit` returns a `Generation`; its `receive` returns the output that has arrived
since the last call. Every open sequence ends with exactly one `Finished`: the scheduler's, or one
made here when the scheduler is lost. `EngineState` is what this process knows about the engine.
Nothing in this module knows about text or HTTP.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
    LauncherBeat,
    PeerLost,
    Ready,
    Reload,
    Shutdown,
    Submit,
    TokenLogprob,
    TokenRow,
    Tokens,
)
from ...shared.sampling import SamplingParams
from ...shared.transport import AsyncReceiver, Sender, frontend_address, scheduler_address

RETRY_AFTER_S = 5.0  # told to clients while the engine restarts
_ABORT_AGAIN_S = 0.1
_IDLE_S = 15.0  # `receive` returns nothing this often, so that streams can show life
_SILENCE_S = 3.0  # three heartbeats
LAUNCHER_LIMIT_S = 10.0  # a launcher that is silent for longer is stopped, and replaces no process
_HEARTBEAT_LIMIT_S = 10.0  # without a heartbeat for so long the scheduler counts as stuck
logger = logging.getLogger(__name__)


@dataclass
class EngineState:
    """The engine as last heard of, for probes, metrics and admission. Times are from the client's
    clock (`time.monotonic`)."""

    ready: Ready | None = None  # None: starting, or lost
    last_epoch: int = -1
    heartbeat: Heartbeat | None = None
    heartbeat_at: float = -math.inf
    progress_at: float = -math.inf  # last time that steps advanced or that there was no work
    generated_per_s: float = 0.0
    launcher: LauncherBeat | None = None  # None: it was never heard
    launcher_at: float = -math.inf
    launcher_news: asyncio.Event = field(default_factory=asyncio.Event)  # set when it is heard
    draining: bool = False
    became_ready: asyncio.Event = field(default_factory=asyncio.Event)
    shutdown: asyncio.Event = field(default_factory=asyncio.Event)
    reload: asyncio.Event = field(default_factory=asyncio.Event)  # SIGHUP: read files again
    shutdown_at: float = math.inf  # when draining must have ended

    def on_heartbeat(self, heartbeat: Heartbeat, now: float) -> None:
        """Store a heartbeat and note whether it shows progress."""
        last = self.heartbeat
        busy = heartbeat.num_running + heartbeat.num_waiting + heartbeat.num_paused > 0
        if last is None or heartbeat.steps != last.steps or not busy:
            self.progress_at = now
        if last is not None and now > self.heartbeat_at:
            tokens = heartbeat.generated_tokens - last.generated_tokens
            self.generated_per_s = max(0.0, tokens / (now - self.heartbeat_at))
        self.heartbeat, self.heartbeat_at = heartbeat, now

    def is_healthy(self, now: float, stall_timeout_s: float) -> bool:
        """Whether heartbeats arrive, and steps advance while there is work."""
        alive = now - self.heartbeat_at <= _HEARTBEAT_LIMIT_S
        return alive and now - self.progress_at <= stall_timeout_s

    def launcher_silence_s(self, now: float) -> float:
        """Time since the launcher was heard; 0 for a process without one."""
        return 0.0 if self.launcher is None else now - self.launcher_at

    @property
    def is_leaving(self) -> bool:
        """Whether this server has been told to stop. It may still accept requests."""
        return self.draining or (self.launcher is not None and self.launcher.is_leaving)

    def why_unready(self, now: float) -> str:
        """Why new requests should go elsewhere; "" if they should not. Unlike `why_not_ready`, it
        also looks at the progress of the engine and at a coming stop."""
        if self.is_leaving:
            return "draining"
        if reason := self.why_not_ready():
            return reason
        if self.heartbeat is None:
            return ""
        if now - self.heartbeat_at > _SILENCE_S:
            return f"engine silent for {now - self.heartbeat_at:.0f} s"
        return f"engine stalled: {self.heartbeat.stall}" if self.heartbeat.stall else ""

    def why_not_ready(self) -> str:
        """Why new requests are refused; "" if they are accepted."""
        if self.draining:
            return "draining"
        if self.ready is None:
            return "starting" if self.last_epoch < 0 else "engine lost"
        if self.heartbeat is not None and not self.heartbeat.worker_ready:
            return "engine restarting"
        return ""


@dataclass
class SequenceOutput:
    """Output of one sequence that has arrived and was not received yet."""

    index: int  # of the sequence in its Generation
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None


class Generation:
    """The open sequences of one HTTP request. `EngineClient` calls `push`, `finish` and `wake`."""

    def __init__(self, client: "EngineClient", name: str, tenant: str, ids: list[int]) -> None:
        self.name = name
        self.tenant = tenant
        self._client = client
        self._request_ids = ids
        self._open = {request_id: index for index, request_id in enumerate(ids)}
        self._pending: dict[int, SequenceOutput] = {}  # by index
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is output to receive, now or later."""
        return bool(self._open or self._pending)

    async def receive(self) -> list[SequenceOutput]:
        """Wait for output; all that arrived since the last call, at most one item per sequence.
        Empty when nothing arrived for a long time."""
        if not self._pending:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pending, self._pending = self._pending, {}
        return list(pending.values())

    def abort(self, index: int) -> None:
        """End one sequence; its `Finished` still arrives."""
        if self._request_ids[index] in self._open:
            self._client.abort([self._request_ids[index]])

    def abort_all(self) -> None:
        """End all sequences; each `Finished` still arrives."""
        self._client.abort(list(self._open))

    def close(self) -> None:
        """Abort what is still open and receive nothing more."""
        if self._open:
            self._client.forget(list(self._open))

    def push(self, row: TokenRow) -> None:
        """Add new tokens of one of the sequences."""
        output = self._output(row.request_id)
        output.token_ids += row.token_ids
        output.logprobs += row.logprobs
        output.prompt_logprobs += row.prompt_logprobs

    def finish(self, finished: Finished) -> None:
        """Add the end of one of the sequences."""
        self._output(finished.request_id).finished = finished
        del self._open[finished.request_id]

    def wake(self) -> None:
        """Let `receive` return."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _output(self, request_id: int) -> SequenceOutput:
        index = self._open[request_id]
        output = self._pending.get(index)
        if output is None:
            output = self._pending[index] = SequenceOutput(index)
            self.wake()
        return output


class EngineClient:
    """This process's link to the scheduler. Nothing arrives unless `run` is running."""

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
        self._dropped = 0  # by links that are closed
        self._aborts: list[int] = []  # request ids to abort at the end of this event-loop turn
        self._greet()

    @property
    def malformed(self) -> int:
        """Number of messages that were dropped because they could not be decoded."""
        return self._receiver.malformed

    @property
    def dropped(self) -> int:
        """Number of messages that were dropped because the scheduler did not read them."""
        return self._dropped + self._sender.dropped

    def repair(self) -> None:
        """Bind the inbox again if its file has vanished. Call it every second."""
        self._receiver.repair()

    @property
    def max_req_total_len(self) -> int:
        """Maximum of prompt + output in tokens, as the engine settled it. Raises UnavailableError
        before it did."""
        if self.state.ready is None:
            problem = f"the engine is not ready: {self.state.why_not_ready()}"
            raise UnavailableError(problem, retry_after_s=RETRY_AFTER_S)
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
        sequences: Sequence[tuple[list[int], SamplingParams]],
        use_prefix_cache: bool = True,
        cache_salt: str = "",
        grammar: Grammar | None = None,
        name: str = "",
        tenant: str = "",
    ) -> Generation:
        """Ask for one sequence per (prompt ids, sampling). `name` is the X-Request-Id, by which
        its `tenant` can abort the request. Raises OverloadedError when the link is full."""
        request_ids = [random.getrandbits(62) for _ in sequences]
        generation = Generation(self, name, tenant, request_ids)
        dropped = self._sender.dropped
        for request_id, (prompt_ids, sampling) in zip(request_ids, sequences, strict=True):
            self._generations[request_id] = generation
            submit = Submit(
                request_id,
                self.index,
                prompt_ids,
                sampling,
                use_prefix_cache,
                cache_salt,
                grammar=grammar,
                tenant=tenant,
            )
            self._sender.send(submit)
        if self._sender.dropped != dropped:
            self.forget(request_ids)
            raise OverloadedError("too many requests on their way", retry_after_s=1.0)
        return generation

    def abort(self, request_ids: Sequence[int]) -> None:
        """End these. One message carries all ids that are aborted in one turn of the event
        loop."""
        if request_ids and not self._aborts:
            asyncio.get_running_loop().call_soon(self._send_aborts)
        self._aborts += request_ids

    def forget(self, request_ids: Sequence[int]) -> None:
        """Abort these and drop whatever still arrives for them."""
        for request_id in request_ids:
            del self._generations[request_id]
        self.abort(request_ids)

    def abort_named(self, name: str, tenant: str | None) -> None:
        """End the sequences of the HTTP request with this name, or all if the name is "". Those
        of `tenant` only, unless it is None."""
        for generation in set(self._generations.values()):
            is_meant = not name or generation.name == name
            if is_meant and tenant in (None, generation.tenant):
                generation.abort_all()

    def tell_others(self, num_frontends: int, name: str, tenant: str | None) -> None:
        """Let the other HTTP processes do the same as `abort_named`."""
        for index in range(num_frontends):
            if index != self.index:
                sender = Sender.connect(frontend_address(self._runtime_dir, index))
                sender.send(AbortNamed(name, tenant))
                sender.close()

    def flush_cache(self) -> None:
        """Let the scheduler drop all cached prefixes that no running request uses."""
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
                    if generation is not None:  # else its client has disconnected
                        generation.push(row)
            case Finished():
                generation = self._generations.pop(message.request_id, None)
                if generation is not None:
                    generation.finish(message)
            case AbortNamed(name=name, tenant=tenant):
                self.abort_named(name, tenant)
            case Heartbeat():
                self.state.on_heartbeat(message, self._clock())
            case LauncherBeat():
                self.state.launcher, self.state.launcher_at = message, self._clock()
                self.state.launcher_news.set()
            case Ready(role="scheduler"):
                self._on_ready(message)
            case PeerLost(role="scheduler", reason=reason):
                self._on_scheduler_lost(reason)
            case PeerLost(role="frontend", index=self.index, reason=reason):
                self.fail_all(f"output was lost: {reason}")  # the scheduler aborted all
            case PeerLost():
                logger.warning("%s %d lost: %s", message.role, message.index, message.reason)
            case Reload():
                self.state.reload.set()
            case Shutdown(drain_s=drain_s):
                self.begin_shutdown(drain_s)
            case _:
                logger.error("unexpected message %s", type(message).__name__)

    def _on_ready(self, ready: Ready) -> None:
        if self.state.ready is None and ready.epoch <= self.state.last_epoch:
            return  # sent by the lost scheduler; the message about its death was faster
        if ready != self.state.ready:  # a frontend that greets at that moment hears it twice
            logger.info("engine ready, epoch %d", ready.epoch)
        self.state.ready, self.state.last_epoch = ready, ready.epoch
        self.state.progress_at = self._clock()
        self.state.became_ready.set()

    def _on_scheduler_lost(self, reason: str) -> None:
        logger.error("scheduler lost: %s", reason)
        self.state.ready, self.state.heartbeat = None, None
        self.fail_all(f"the engine was lost: {reason}")
        self._aborts.clear()  # the next scheduler does not know these requests
        self._dropped += self._sender.dropped
        self._sender.close()
        self._greet()

    def _greet(self) -> None:
        self._sender = Sender.connect(scheduler_address(self._runtime_dir))
        self._sender.send(self._hello)

    def _send_aborts(self) -> None:
        if self._aborts and self._sender.send(Abort(self._aborts)):
            self._aborts = []
        elif self._aborts:  # the link is full: the scheduler does not read
            asyncio.get_running_loop().call_later(_ABORT_AGAIN_S, self._send_aborts)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_IDLE_S)
            for generation in set(self._generations.values()):
                generation.wake()
