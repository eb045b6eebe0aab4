"""The scheduler as a pure state machine: `Scheduler.step(now_ns, inbox) -> (plan, outbox)`.

No clock, no sockets, no randomness, no dependence on set order: the same calls give the same
answers, in production (`loop.py`) and in simulation (`tests/sim/`). This file is the life of a
request; what fits into a step is in `batch.py`, who may start in `admission.py`, pages in
`memory.py`, the worker group in `peers.py`.
"""

import math
from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from ..shared.config import ServeConfig
from ..shared.messages import (
    Abort,
    AnyMessage,
    Finished,
    GrammarLoaded,
    Heartbeat,
    Hello,
    PeerLost,
    Ready,
    Shutdown,
    StepPlan,
    StepResult,
    Submit,
    Tokens,
    WorkerFailed,
)
from .admission import Admission, Ending, Forecast, StepLimits
from .batch import StepBuilder
from .counts import Counts
from .draft import DraftPolicy
from .grammars import Grammars
from .memory import forget
from .peers import Frontends, Outgoing, WorkerGroup
from .preempt import choose_victim
from .request import Request, RequestState
from .results import Flight, Outcome, finished_message
from .waiting import WaitingQueue

MAX_WORKER_LOSSES = 2  # a request that ran in so many dying groups may be the cause
_SCAN = 64  # queued requests looked at per step
_MAX_MISFITS = 4  # of these, how many that do not fit
_MAX_OVERTAKEN = 32  # then nobody starts before the one that does not fit


class Scheduler:
    """All requests and all pages of one server. `config` must be settled, else ConfigError.
    Worker groups before `first_epoch` are dead."""

    def __init__(self, config: ServeConfig, first_epoch: int = 0) -> None:
        self._config = config
        self._limits = StepLimits.of(config)
        self._admission = Admission(config)
        self._frontends = Frontends()
        self.workers = WorkerGroup(config, self._limits, first_epoch)
        self._requests: dict[int, Request] = {}  # every live one, by id
        self._waiting = WaitingQueue()
        self._grammars = Grammars(config)
        self._drafts = DraftPolicy(config)
        self._running: list[Request] = []  # those with a row, sorted by age_key
        self._outbox: list[Outgoing] = []
        self._now_ns = 0
        self._drain_deadline_ns = math.inf
        self._num_submits = 0
        self._counts = Counts()

    # --- one step --------------------------------------------------------------------------

    def step(
        self, now_ns: int, inbox: Sequence[AnyMessage]
    ) -> tuple[StepPlan | None, list[Outgoing]]:
        """Take in messages, then make at most one plan. Call again with an empty inbox until the
        plan is None: two may be in flight. `now_ns` must not go backwards."""
        self._now_ns = now_ns
        for message in inbox:
            self._handle(message)
        self._check_time()
        plan = self._plan()
        self._outbox += [Outgoing("worker", 0, message) for message in self._grammars.outbox]
        self._grammars.outbox.clear()
        outbox, self._outbox = self._outbox, []
        return plan, outbox

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case StepResult():
                self._on_result(message)
            case Submit():
                self._on_submit(message)
            case GrammarLoaded():
                self._on_grammar_loaded(message)
            case Abort():
                for request_id in message.request_ids:
                    if (request := self._requests.get(request_id)) is not None:
                        self._finish(request, Ending("abort"))
            case Hello():
                self._on_hello(message)
            case Ready(role="worker"):
                self._on_worker_ready(message)
            case PeerLost():
                self._on_peer_lost(message)
            case Shutdown():
                self._on_shutdown(message)
            case _:
                self._counts.malformed_messages += 1  # well-formed, but nobody should send it here

    def _on_submit(self, submit: Submit) -> None:
        if submit.request_id in self._requests:  # its one Finished is still to come
            self._counts.malformed_messages += 1
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
        if ending := self._admission.refuse(request, len(self._waiting), self._waiting.num_tokens):
            self._send_finished(request, ending)
            return
        if timeout_ns := self._admission.queue_timeout_ns(submit.timeout_s):
            request.deadline_ns = self._now_ns + timeout_ns
        self._requests[request.request_id] = request
        self._waiting.push(request)
        self._grammars.add(request, self._now_ns)

    def _on_grammar_loaded(self, loaded: GrammarLoaded) -> None:
        if self._grammars.on_loaded(loaded, self._now_ns) and loaded.error:
            ending = Ending("error", f"the grammar cannot be loaded: {loaded.error}")
            for request in list(self._requests.values()):
                if request.grammar is not None and request.grammar.name == loaded.name:
                    self._finish(request, ending)

    def _check_time(self) -> None:
        for request in self._waiting.expired(self._now_ns):
            if request.state is RequestState.WAITING:
                self._finish(request, self._admission.timed_out(len(self._waiting)))
        if self._now_ns >= self._drain_deadline_ns:
            for request in list(self._requests.values()):
                self._finish(request, Ending("unavailable", "the server is shutting down"))
        for work, name in ((self.workers, "a step"), (self._grammars, "loading a grammar")):
            if work.is_overdue(self._now_ns):
                self._fail_workers(f"{name} took longer than {self._config.step_timeout_s:.0f} s")

    # --- planning ----------------------------------------------------------------------------

    def _plan(self) -> StepPlan | None:
        workers = self.workers
        if not workers.can_take_plan or not self._requests:
            return None
        builder = StepBuilder(workers.memory, self._limits, self._drafts)
        preemptions = self._counts.preemptions
        builder.add_decodes(self._running, self._reclaim_page)
        for request in builder.prefill_waits:
            builder.add_chunk(request)
        if self._counts.preemptions == preemptions:  # else what became free is for those that run
            self._start_waiting(builder)
        plan = builder.build(workers.epoch, workers.next_step, workers.freed_rows)
        if plan is not None:
            workers.sent(plan, builder.flight(plan), self._now_ns)
        return plan

    def _reclaim_page(self, request: Request) -> bool:
        """Make a page available for `request`, taking those of younger ones. False: it is the
        youngest and had to give way itself."""
        while not self.workers.memory.num_available:
            victim = choose_victim(self._running)
            self._leave_row(victim)
            if victim.state is not RequestState.LAST:
                victim.move(RequestState.PAUSED)
                self._waiting.push(victim)
                self._counts.preemptions += 1
            if victim is request:
                return False
        return True

    def _start_waiting(self, builder: StepBuilder) -> None:
        """Start queued requests in order. One that does not fit may be overtaken by others, but
        not for ever; one that waits for results or for a prefix that a running request is just
        computing is passed over until those are there (steps in flight, so soon)."""
        misfits: list[Request] = []
        forecast = self._admission.forecast(self.workers.memory, self._running)
        for request in self._waiting.first(_SCAN):
            if not self.workers.free_rows or not builder.budget:
                return
            must_wait = request.results_in_flight or request.waits_for_prefix
            if must_wait or self._grammars.is_missing(request):
                continue
            if self._try_start(request, builder, forecast):
                for misfit in misfits:
                    misfit.overtaken += 1
            elif not request.waits_for_prefix:
                misfits.append(request)
                if request.overtaken >= _MAX_OVERTAKEN or len(misfits) >= _MAX_MISFITS:
                    return

    def _try_start(self, request: Request, builder: StepBuilder, forecast: Forecast) -> bool:
        memory = self.workers.memory
        if request.pages_needed > memory.num_available:  # as of the last look at the cache
            return False
        nodes, num_needed = memory.find(request)
        request.pages_needed = 0
        num_cached_tokens = len(nodes) * memory.page_size
        num_new = len(request.tokens) - num_cached_tokens
        if request.waits_for_prefix or not builder.can_chunk(num_new):
            return False
        if not self._admission.can_start(forecast, request, num_needed):
            request.pages_needed = num_needed
            return False
        self._waiting.remove(request)
        memory.start(request, nodes)
        forecast.add(request)
        request.row = self.workers.free_rows.pop()
        request.overtaken = 0
        request.move(RequestState.PREFILL)
        insort(self._running, request, key=attrgetter("age_key"))
        if request.queue_ns < 0:  # its first start
            request.queue_ns = self._now_ns - request.arrival_ns
            request.num_cached_tokens = num_cached_tokens
            self._counts.prefix_queries += request.num_prompt_tokens if request.uses_cache else 0
            self._counts.prefix_hits += num_cached_tokens
            self._admission.observe_start(self._now_ns, len(self._waiting))
        builder.admit(request)
        builder.add_chunk(request)
        return True

    # --- results and endings -----------------------------------------------------------------

    def _on_result(self, result: StepResult) -> None:
        workers = self.workers
        if result.epoch != workers.epoch or not workers.ready:
            return  # from a dead incarnation
        flight = workers.answered(result, self._now_ns)
        if flight is None:
            self._fail_workers(f"the result of step {result.step} does not fit the plan")
            return
        self._counts.steps += 1
        if flight.is_void:
            return
        if result.error:
            self._on_failed_step(flight, result.error)
            return
        outcome = Outcome()
        outcome.add_prompt_logprobs(flight, result)
        outcome.add_tokens(flight, result.rows, workers.memory)
        self._drafts.observe(flight, outcome.accepted, workers.step_ns)
        self._counts.generated_tokens += outcome.num_tokens
        tokens = outcome.rows.items()
        self._outbox += [Outgoing("frontend", index, Tokens(rows)) for index, rows in tokens]
        for request, reason in outcome.ended:
            self._admission.observe_output(request.num_output_tokens)
            self._finish(request, Ending(reason))

    def _on_failed_step(self, flight: Flight, error: str) -> None:
        """A step wrote nothing: its requests end. Others may have been planned on what it should
        have written: all start over, and the cache is forgotten."""
        for request in flight.requests():
            self._finish(request, Ending("error", error))
        for request in self._running.copy():
            self._leave_row(request)
        self.workers.void_plans()
        self.workers.flush_cache()
        self._replay()

    def _finish(self, request: Request, ending: Ending, tell: bool = True) -> None:
        """End a live request, whatever its state: row and pages are free at once, its results in
        flight will be ignored."""
        if request.row >= 0:
            self._leave_row(request)
        elif request.state in (RequestState.WAITING, RequestState.PAUSED):
            self._waiting.remove(request)
        request.move(RequestState.FINISHED)
        del self._requests[request.request_id]
        self._grammars.remove(request)
        if tell:
            self._send_finished(request, ending)

    def _send_finished(self, request: Request, ending: Ending) -> None:
        finished = finished_message(request, ending, self._now_ns)
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
            message = self.workers.ready_message(self._admission.max_req_total_len)
            self._outbox.append(Outgoing("frontend", hello.index, message))

    def _on_worker_ready(self, ready: Ready) -> None:
        if self.workers.is_newer(ready):  # the loss of the last group is not heard yet
            self._lose_workers()
        if not self.workers.enroll(ready):
            return
        self._grammars.start(self.workers.epoch, self._now_ns)
        self._admission.settle_limit(self.workers.memory.num_pages)
        message = self.workers.ready_message(self._admission.max_req_total_len)
        self._outbox.append(Outgoing("launcher", 0, message))
        for index in range(self._config.httpserver_workers):
            self._outbox.append(Outgoing("frontend", index, message))
        for request in list(self._requests.values()):  # the limit may be lower than it was
            if (ending := self._admission.fit_length(request)) is not None:
                self._finish(request, ending)

    def _on_peer_lost(self, lost: PeerLost) -> None:
        if lost.role == "worker" and self.workers.is_hit(lost):
            self._lose_workers()
        elif lost.role == "frontend" and self._frontends.lost(lost.index):
            self._abort_frontend(lost.index)

    def _abort_frontend(self, index: int) -> None:
        for request in [r for r in self._requests.values() if r.frontend == index]:
            self._finish(request, Ending("abort"), tell=False)

    def _lose_workers(self) -> None:
        """All KV is gone. What ran goes back to the head of the queue with its tokens so far and
        is replayed by the next group: same seeds and positions, so the same tokens."""
        suspects = [r for r in self._requests.values() if self._grammars.is_next(r)]
        self.workers.forget()
        self._grammars.forget()
        self._running.clear()
        for request in suspects + self._replay():
            request.worker_losses += 1
            if request.worker_losses >= MAX_WORKER_LOSSES:
                text = f"the workers died {MAX_WORKER_LOSSES} times while working on this request"
                self._finish(request, Ending("unavailable", text))

    def _replay(self) -> list[Request]:
        """What ran, without rows and pages by now, goes back to the queue. -> these requests"""
        queued, lost = (RequestState.WAITING, RequestState.PAUSED), []
        for request in self._requests.values():
            request.waits_for, request.pages_needed = None, 0
            if request.state in queued and not request.results_in_flight:
                continue
            lost.append(request)
            forget(request)
            request.row = -1
            request.lose_planned()
            if request.state not in queued:
                request.move(RequestState.PAUSED)
                self._waiting.push(request)
        return lost

    def _fail_workers(self, reason: str) -> None:
        """The worker group does not do what it should: have the launcher restart it."""
        if not self.workers.failed:
            self.workers.failed = True
            self._outbox.append(
                Outgoing("launcher", 0, WorkerFailed(self.workers.epoch, 0, reason))
            )

    def _on_shutdown(self, shutdown: Shutdown) -> None:
        self._admission.draining = True
        deadline_ns = self._now_ns + max(0.0, shutdown.drain_s) * 1e9
        self._drain_deadline_ns = min(self._drain_deadline_ns, deadline_ns)

    # --- what others want to know --------------------------------------------------------------

    @property
    def num_live(self) -> int:
        """Requests still owed their Finished."""
        return len(self._requests)

    def heartbeat(self, malformed: int = 0, step_us: float = 0.0) -> Heartbeat:
        """The numbers of this moment. `malformed` counts what the inbox could not decode and
        `step_us` is the measured mean time of a step: the core cannot know these."""
        forecast = self._admission.forecast(self.workers.memory, self._running)
        return self._counts.heartbeat(
            self.workers,
            self._requests.values(),
            malformed,
            estimated_peak_tokens=forecast.peak(),
            step_us=step_us,
            **self._drafts.counts(),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, rows, queue and requests account for each other."""
        self.workers.check_integrity(self._running)
        self._grammars.check_integrity(list(self._requests.values()))
        keys = [r.age_key for r in self._running]
        assert keys == sorted(keys), "running requests are not sorted"
        queued = self._waiting.check_integrity()
        detached = [r for r in self._requests.values() if r.is_detached]
        found = {r.request_id: r for r in (*queued, *self._running, *detached)}
        assert found == self._requests, "a request is lost or kept"
        assert len(queued) + len(self._running) + len(detached) == len(found), "a request is twice"
