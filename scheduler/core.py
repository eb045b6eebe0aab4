"""The scheduler as a pure state machine: `Scheduler.step(now_ns, inbox) -> (plan, outbox)`.

It has no clock, no sockets, no randomness, and does not depend on the order of sets: the same calls
give the same answers, in production (`loop.py`) and in simulation (`tests/sim/`). This file is the
life of a request. One step's plan and result are in `batch.py`, the queue and who may start in
`admission.py`, pages in `memory.py`, the worker group in `worker_group.py`.
"""

import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import msgspec

from ..shared.config import ServeConfig
from ..shared.messages import (
    Abort,
    AnyMessage,
    Finished,
    FlushCache,
    Heartbeat,
    Hello,
    Message,
    PeerLost,
    Ready,
    Shutdown,
    StepPlan,
    StepResult,
    Submit,
    Tokens,
    WorkerFailed,
)
from .admission import Admission, Forecast, WaitingQueue, choose_victim
from .batch import Outcome, SentStep, StepBuilder, StepLimits
from .draft import DraftPolicy
from .fairness import FairQueue
from .losses import Frontends, blame, requeue
from .request import Ending, Request, RequestState
from .stats import Stats
from .worker_group import WorkerGroup

_SCAN = 64  # queued requests looked at per step
_MAX_MISFITS = 4  # of these, how many that do not fit
_MAX_OVERTAKEN = 32  # requests that may start before one that does not fit
_AGE_KEY = attrgetter("age_key")


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message and its destination: frontend `index`, or the launcher (0)."""

    to: str  # "frontend" | "launcher"
    index: int
    message: Message


class Scheduler:
    """All requests and all pages of one server. Worker groups before `first_epoch` are dead.
    Raises ConfigError if `config` is not settled."""

    def __init__(self, config: ServeConfig, first_epoch: int = 0) -> None:
        self._config = config
        self._limits = StepLimits.of(config)
        self._admission = Admission(config)
        self._drafts = DraftPolicy(config)
        self._frontends = Frontends()
        self._stats = Stats()
        self.workers = WorkerGroup(config, self._limits.max_rows, first_epoch)
        self._requests: dict[int, Request] = {}  # every live one, by id
        self._waiting: FairQueue | WaitingQueue = FairQueue() if config.has_keys else WaitingQueue()
        self._running: list[Request] = []  # those with a row, sorted by age_key
        self._outbox: list[Outgoing] = []
        self._now_ns = 0
        self._drain_deadline_ns = math.inf
        self._num_submits = 0

    # --- one step --------------------------------------------------------------------------

    def step(
        self, now_ns: int, inbox: Sequence[AnyMessage]
    ) -> tuple[StepPlan | None, list[Outgoing]]:
        """Take in messages, then make at most one plan. Call again with an empty inbox until the
        plan is None: two may be in flight. `now_ns` must not go backwards."""
        self._now_ns = now_ns
        for message in inbox:
            self._handle(message)
        self._check_deadlines()
        plan = self._make_plan()
        outbox, self._outbox = self._outbox, []
        return plan, outbox

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case StepResult():
                self._on_result(message)
            case Submit():
                self._on_submit(message)
            case Abort():
                for request_id in message.request_ids:
                    if (request := self._requests.get(request_id)) is not None:
                        self._finish(request, Ending("abort"))
            case FlushCache():
                self.workers.memory.flush()
            case Hello():
                self._on_hello(message)
            case Ready(role="worker"):
                self._on_worker_ready(message)
            case PeerLost():
                self._on_peer_lost(message)
            case Shutdown():
                self._admission.draining = True
                deadline_ns = self._now_ns + max(0.0, message.drain_s) * 1e9
                self._drain_deadline_ns = min(self._drain_deadline_ns, deadline_ns)
            case _:  # well-formed, but not meant for the scheduler
                self._stats.malformed_messages += 1

    def _on_submit(self, submit: Submit) -> None:
        if submit.request_id in self._requests:  # it is live, and gets one Finished only
            self._stats.malformed_messages += 1
            return
        self._num_submits += 1
        try:
            uses_cache = self._admission.uses_cache(submit)
            request = Request(submit, self._num_submits, self._now_ns, uses_cache)
        except OverflowError:
            message = "a token id of the prompt has more than 32 bits"
            refusal = Finished(submit.request_id, "invalid", message=message, field="inputs")
            self._outbox.append(Outgoing("frontend", submit.frontend, refusal))
            return
        if ending := self._admission.refuse(request, self._waiting):
            self._send_finished(request, ending)
            return
        if timeout_ns := self._admission.queue_timeout_ns(submit):
            request.deadline_ns = self._now_ns + timeout_ns
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def _check_deadlines(self) -> None:
        for request in self._waiting.expired(self._now_ns):
            if request.state is RequestState.WAITING:
                self._finish(request, self._admission.timed_out(len(self._waiting)))
        if self._now_ns >= self._drain_deadline_ns:
            for request in list(self._requests.values()):
                self._finish(request, Ending("unavailable", "the server is shutting down"))
        if self.workers.is_overdue(self._now_ns):
            self._fail_workers(self.workers.overdue(self._now_ns))

    # --- making a plan -----------------------------------------------------------------------

    def _make_plan(self) -> StepPlan | None:
        workers = self.workers
        if not workers.can_take_plan or not self._requests:
            return None
        may_lack_pages = len(self._running) > workers.memory.num_available  # one each, at most
        has_preempted = may_lack_pages and self._preempt()
        builder = StepBuilder(workers.new_plan(), workers.memory, self._limits, self._drafts)
        builder.add_running(self._running)
        if len(self._waiting) and not has_preempted:  # free pages are for those that run
            self._start_waiting(builder)
        step = builder.build()
        if step is None:
            return None
        workers.sent(step, self._now_ns)
        self._stats.add_plan(step.plan)
        return step.plan

    def _preempt(self) -> bool:
        """Take rows and pages from requests until all others can have the page that their next
        token needs. Returns whether a request went back to the queue."""
        has_preempted = False
        needy = [request for request in self._running if request.needs_page]
        while len(needy) > self.workers.memory.num_available:
            victim = choose_victim(self._running)
            if victim is needy[-1]:
                needy.pop()
            self._leave_row(victim)
            if victim.state is not RequestState.LAST:
                victim.move(RequestState.PAUSED)
                self._waiting.push(victim)
                self._stats.preemptions += 1
                has_preempted = True
        return has_preempted

    def _start_waiting(self, builder: StepBuilder) -> None:
        """Start queued requests in order. One that does not fit may be overtaken by others, up to
        a limit. One that waits for results in flight, or for a prefix that a running request is
        computing is passed over: that takes a few steps only."""
        misfits: list[Request] = []
        forecast = Forecast(self._admission, self.workers.memory, self._running)
        for request in self._waiting.first(_SCAN):
            if not self.workers.free_rows or not builder.budget:
                return
            if request.results_in_flight or request.table.waits_for_prefix:
                continue
            if self._try_start(request, builder, forecast):
                for misfit in misfits:
                    misfit.overtaken += 1
            elif not request.table.waits_for_prefix:
                misfits.append(request)
                if request.overtaken >= _MAX_OVERTAKEN or len(misfits) >= _MAX_MISFITS:
                    return

    def _try_start(self, request: Request, builder: StepBuilder, forecast: Forecast) -> bool:
        memory = self.workers.memory
        if request.pages_needed > memory.num_available:  # as of the last look at the cache
            return False
        nodes, num_needed = memory.find(request.table)
        request.pages_needed = 0
        num_cached_tokens = len(nodes) * memory.page_size
        num_new = len(request.tokens) - num_cached_tokens
        if request.table.waits_for_prefix or not builder.can_chunk(num_new):
            return False
        is_alone = not self._running
        may_start = is_alone or forecast.can_start(request, num_needed)
        if num_needed > memory.num_available or not may_start:
            request.pages_needed = num_needed
            return False
        self._waiting.remove(request)
        memory.start(request.table, nodes)
        if not is_alone:
            forecast.add(request)
        request.row = self.workers.free_rows.pop()
        request.overtaken = 0
        request.move(RequestState.PREFILL)
        insort(self._running, request, key=_AGE_KEY)
        if request.queue_ns < 0:  # its first start
            request.queue_ns = self._now_ns - request.arrival_ns
            request.num_cached_tokens = num_cached_tokens
            self._stats.prefix_hits += num_cached_tokens
            if request.table.salt is not None:
                self._stats.prefix_queries += request.num_prompt_tokens
            self._admission.observe_start(self._now_ns, len(self._waiting))
        builder.admit(request)
        return True

    # --- results and endings -----------------------------------------------------------------

    def _on_result(self, result: StepResult) -> None:
        workers = self.workers
        if result.epoch != workers.epoch or not workers.ready:
            return  # from a dead group
        step = workers.answered(result, self._now_ns)
        if step is None:
            self._fail_workers(f"the result of step {result.step} does not fit the plan")
            return
        self._stats.add_step(step.plan, workers.step_ns)
        if step.is_void:
            return
        if result.error:
            self._on_failed_step(step, result.error)
            return
        outcome = Outcome()
        if result.prompt_logprobs:
            outcome.add_prompt_logprobs(step, result)
        outcome.add_tokens(step, result.rows, workers.memory)
        for request in step.sampled_chunks():
            if request.first_token_ns < 0:
                request.first_token_ns = self._now_ns
        if self._drafts.longest:
            self._drafts.observe(step.plan, outcome.accepted, workers.step_ns)
        self._stats.decoded_rows += sum(outcome.accepted)
        self._stats.generated_tokens += outcome.num_tokens
        for frontend, rows in outcome.rows.items():
            self._outbox.append(Outgoing("frontend", frontend, Tokens(rows)))
        for request, ending in outcome.ended:
            self._admission.observe_output(request.num_output_tokens)
            self._finish(request, ending)

    def _on_failed_step(self, step: SentStep, error: str) -> None:
        """A step wrote nothing: its requests end. Plans in flight and cached pages may build on
        what it should have written, so all other requests start over without them."""
        for request in step.live_requests():
            self._finish(request, Ending("error", error))
        for request in self._running.copy():
            self._leave_row(request)
        self.workers.void_plans()
        self.workers.memory.flush()
        requeue(self._requests.values(), self._waiting)

    def _finish(self, request: Request, ending: Ending, tell: bool = True) -> None:
        """End a live request in any state. Its row and pages are free at once; its results in
        flight will be ignored."""
        if request.row >= 0:
            self._leave_row(request)
        elif request.state in (RequestState.WAITING, RequestState.PAUSED):
            self._waiting.remove(request)
        request.move(RequestState.FINISHED)
        del self._requests[request.request_id]
        if tell:
            self._send_finished(request, ending)

    def _send_finished(self, request: Request, ending: Ending) -> None:
        finished = request.finished_message(ending, self._now_ns)
        self._outbox.append(Outgoing("frontend", request.frontend, finished))

    def _leave_row(self, request: Request) -> None:
        self.workers.release_row(request)
        self._running.remove(request)

    # --- processes come and go ---------------------------------------------------------------

    def _on_hello(self, hello: Hello) -> None:
        if hello.role != "frontend":
            return
        if self._frontends.greeted(hello.index, hello.pid):
            self._abort_frontend(hello.index)
        if self.workers.ready:
            self._outbox.append(Outgoing("frontend", hello.index, self._ready_message()))

    def _on_worker_ready(self, ready: Ready) -> None:
        if self.workers.is_newer(ready):  # the loss of the last group is not reported yet
            self._lose_workers()
        if not self.workers.enroll(ready):
            return
        self._admission.settle_limit(self.workers.memory.num_pages)
        message = self._ready_message()
        self._outbox.append(Outgoing("launcher", 0, message))
        for index in range(self._config.httpserver_workers):
            self._outbox.append(Outgoing("frontend", index, message))
        for request in list(self._requests.values()):  # the limit may be lower than it was
            if (ending := self._admission.fit_length(request)) is not None:
                self._finish(request, ending)

    def _ready_message(self) -> Ready:
        limit = self._admission.max_req_total_len
        return Ready("scheduler", 0, self.workers.epoch, self.workers.memory.num_pages, limit)

    def _on_peer_lost(self, lost: PeerLost) -> None:
        if lost.role == "worker" and self.workers.is_hit(lost):
            self._lose_workers()
        elif lost.role == "frontend" and self._frontends.lost(lost.index):
            self._abort_frontend(lost.index)

    def cut_frontend(self, index: int) -> None:
        """A frontend that is alive did not get a message. Abort its requests; that the engine is
        ready may have been in the message, so it is said again."""
        self._abort_frontend(index)
        if self.workers.ready:
            self._outbox.append(Outgoing("frontend", index, self._ready_message()))

    def _abort_frontend(self, index: int) -> None:
        for request in [r for r in self._requests.values() if r.frontend == index]:
            self._finish(request, Ending("abort"), tell=False)

    def _lose_workers(self) -> None:
        """All KV is gone. The cause may be a request that ran."""
        self.workers.forget()
        self._running.clear()
        for request, ending in blame(requeue(self._requests.values(), self._waiting)):
            self._finish(request, ending)

    def _fail_workers(self, reason: str) -> None:
        """The workers hang or send nonsense: ask the launcher to restart them."""
        if not self.workers.failed:
            self.workers.failed = True
            message = WorkerFailed(self.workers.epoch, 0, reason)
            self._outbox.append(Outgoing("launcher", 0, message))

    # --- heartbeat and checks ----------------------------------------------------------------

    @property
    def num_live(self) -> int:
        """Requests whose Finished is still to come."""
        return len(self._requests)

    def heartbeat(self, malformed: int = 0, step_us: float = 0.0) -> Heartbeat:
        """The state at this moment. `malformed` is the number of messages that could not be
        decoded and `step_us` the measured mean time of a step: the core cannot know these."""
        requests = self._requests.values()
        peak = Forecast(self._admission, self.workers.memory, self._running).peak()
        beat = self._stats.heartbeat(self.workers, requests, self._drafts, peak, malformed, step_us)
        stall = self.workers.stall(self._now_ns)
        return msgspec.structs.replace(beat, stall=stall) if stall else beat

    def check_integrity(self) -> list[Request]:
        """All live requests. Raise AssertionError unless pages, rows, queue and requests account
        for each other."""
        self.workers.check_integrity(self._running)
        keys = [r.age_key for r in self._running]
        assert keys == sorted(keys), "running requests are not sorted"
        queued = self._waiting.check_integrity()
        detached = [r for r in self._requests.values() if r.is_detached]
        counted = [*queued, *self._running, *detached]
        by_id = {r.request_id: r for r in counted}
        assert by_id == self._requests, "a request is lost or kept"
        assert len(counted) == len(by_id), "a request is twice"
        return counted
