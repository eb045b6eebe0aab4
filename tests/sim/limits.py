"""What the scheduler promises about limits, checked after each of its steps: the queue, the order
of starts, room for those that run, preemptions, aborts and shares of users.

The checks know the messages, the plan and the live requests. They state each promise anew and use
no decision of the scheduler's own.
"""

from collections import Counter
from collections.abc import Iterable

from glimmer.scheduler.core import Outgoing
from glimmer.scheduler.memory import Memory
from glimmer.scheduler.request import Request, RequestState
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import (
    Abort,
    Finished,
    Hello,
    Message,
    PeerLost,
    Ready,
    Shutdown,
    StepPlan,
    StepResult,
    Submit,
    Tokens,
)

QUEUED = (RequestState.WAITING, RequestState.PAUSED)
MOST_OVERTAKEN = 32  # starts before a request that does not fit; the step that reaches it may add
KEY_SHARE = 4  # one user may have this multiple of what is free in the queue


class Violation(AssertionError):  # noqa: N818 - reads better
    """An invariant does not hold."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Violation(what)


class QueueLimits:
    """A request is refused exactly if the queue is full when it comes."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._queued: dict[int, tuple[str, int]] = {}  # id -> user, prompt tokens
        self._draining = False
        self.num_refused = 0

    def after(
        self, inbox: list[Message], finished: dict[int, Finished], live: list[Request]
    ) -> None:
        queued = self._queued
        self._queued = {
            r.request_id: (r.tenant, r.num_prompt_tokens) for r in live if r.state in QUEUED
        }
        alive = {r.request_id for r in live}
        is_known = True
        for message in inbox:
            match message:
                case Hello() | Ready() | PeerLost():
                    is_known = False  # many requests may come and go
                case StepResult(error=error) if error:
                    is_known = False
                case Shutdown():
                    self._draining = True
                case Abort(request_ids=request_ids):
                    for request_id in request_ids:
                        queued.pop(request_id, None)
                case Submit() if is_known:
                    self._check(message, queued, finished, alive)

    def _check(
        self,
        submit: Submit,
        queued: dict[int, tuple[str, int]],
        finished: dict[int, Finished],
        alive: set[int],
    ) -> None:
        request_id, end = submit.request_id, finished.get(submit.request_id)
        if self._draining:
            expect(request_id not in alive, "accepted while draining")
        elif end is None or end.reason not in ("invalid", "overloaded"):
            expect(not self._is_full(submit, queued), "accepted although the queue is full")
        elif end.reason == "overloaded" and "in time" not in end.message:
            self.num_refused += 1
            expect(self._is_full(submit, queued), f"refused without cause: {end.message}")
        if end is None or (end.reason != "invalid" and "are waiting" not in end.message):
            queued[request_id] = (submit.tenant, len(submit.prompt_ids))

    def _is_full(self, submit: Submit, queued: dict[int, tuple[str, int]]) -> bool:
        config, size = self._config, len(submit.prompt_ids)
        free = config.max_queued_requests - len(queued)
        free_tokens = config.max_queued_tokens - sum(tokens for _, tokens in queued.values())
        if free <= 0 or (queued and size > free_tokens):
            return True
        if not submit.tenant:
            return False
        own = [tokens for tenant, tokens in queued.values() if tenant == submit.tenant]
        over_tokens = own and sum(own) + size > KEY_SHARE * free_tokens
        return len(own) >= KEY_SHARE * free or bool(over_tokens)


class Order:
    """Few start before an older request of the same user and priority. The youngest gives up its
    pages, and only so that others go on."""

    def __init__(self, config: ServeConfig) -> None:
        self._most = MOST_OVERTAKEN - 1 + (config.running_max_req_size or 0)
        self._page_size = config.page_size
        self._started: set[int] = set()  # ids that ran at some time
        self._overtaken: Counter[int] = Counter()  # by id, since the request is in the queue
        self._running: dict[int, Request] = {}  # by row
        self._claims: dict[int, int] = {}  # of these, by id: pages held and needed
        self._preempted: Counter[int] = Counter()
        self._preempted_keys: dict[int, tuple[int, int]] = {}
        self._gained: set[int] = set()  # preempted, and older ones went on since
        self.most_overtaken = 0

    @property
    def most_preempted(self) -> int:
        return max(self._preempted.values(), default=0)

    def after(
        self, plan: StepPlan | None, live: list[Request], is_lost: bool, memory: Memory
    ) -> None:
        """`is_lost`: all KV is gone, so that none was preempted."""
        if not is_lost:
            num_needed = sum(r.needs_page for r in live)  # rows beyond the budget of the step
            self._check_victims(memory.num_available - num_needed)
        gone = (RequestState.FINISHED, RequestState.LAST)
        if is_lost or any(r.row < 0 and r.state in gone for r in self._running.values()):
            self._gained.update(self._preempted)
        self._running = {r.row: r for r in live if r.row >= 0}
        self._claims = {
            r.request_id: len(r.table.pages) + r.needs_page for r in self._running.values()
        }
        if plan is None:
            return
        if self._preempted and plan.appended:
            oldest = min(self._running[appended.row].age_key for appended in plan.appended)
            self._gained.update(i for i, key in self._preempted_keys.items() if oldest < key)
        if plan.admitted:
            self._check_starts(plan, live, memory.num_pages)

    def _check_victims(self, num_spare: int) -> None:
        before = self._running.values()
        paused = [r for r in before if r.state is RequestState.PAUSED]
        if not paused:
            return
        served = (RequestState.PREFILL, RequestState.DECODE)
        kept = [r.age_key for r in before if r.state in served]
        oldest = min(r.age_key for r in paused)
        expect(
            not kept or max(kept) < oldest, "an older request was preempted before a younger one"
        )
        last = min(paused, key=lambda r: r.age_key)  # the oldest is chosen last
        is_needed = num_spare < self._claims[last.request_id]
        # One that uses the prefix cache may also give up a page that is not in its table.
        uses_cache = any(r.table.salt is not None for r in paused)
        expect(is_needed or uses_cache, "a request was preempted without need")
        for request in paused:
            request_id = request.request_id
            is_first = request_id not in self._preempted
            expect(is_first or request_id in self._gained, "preempted twice, and nobody went on")
            self._preempted[request_id] += 1
            self._preempted_keys[request_id] = request.age_key
            self._gained.discard(request_id)

    def _check_starts(self, plan: StepPlan, live: list[Request], num_pages: int) -> None:
        queued = [r for r in live if r.state in QUEUED]
        starts = [self._running[admit.row] for admit in plan.admitted]
        for start in starts:
            is_new = start.request_id not in self._started
            self._started.add(start.request_id)
            self._overtaken.pop(start.request_id, None)
            key = (is_new, start.arrival)
            for request in queued:
                if (
                    request.priority == start.priority
                    and request.tenant == start.tenant
                    and (request.request_id not in self._started, request.arrival) < key
                    and request.table.waits_for is None
                    and not request.results_in_flight
                ):
                    self._overtaken[request.request_id] += 1
        for request in queued:
            overtaken = self._overtaken[request.request_id]
            self.most_overtaken = max(self.most_overtaken, overtaken)
            expect(overtaken <= self._most, f"overtaken by {overtaken} younger requests")
        if len(self._running) > 1:
            self._check_room(starts, num_pages)

    def _check_room(self, starts: list[Request], num_pages: int) -> None:
        """Whoever runs can grow by a page, or to its end, when another starts beside it."""
        size, rows = self._page_size, []
        for request in self._running.values():
            growth = min(size, request.max_total_tokens - len(request.tokens))
            rows.append((growth, (len(request.table.pages) - request.table.num_shared) * size))
        pages = {page for r in self._running.values() for page in r.table.pages}
        peak = total = 0
        for count, (growth, used) in enumerate(sorted(rows, reverse=True), 1):
            total += used
            peak = max(peak, total + count * growth)
        shared = max(0, len(pages) * size - total)
        # Cached pages that nobody used count for the request that starts alone.
        capacity = num_pages * size + sum(r.table.num_shared * size for r in starts)
        expect(shared + peak <= capacity, "started without room for those that run")


class Shares:
    """Between two users who both wait, shares of the computed tokens differ by no more than what
    their rows can compute. Holds if pages never lack: then the order is by shares alone."""

    def __init__(self, config: ServeConfig) -> None:
        rows, longest = config.running_max_req_size or 0, config.max_req_total_len or 0
        self._bound = 2 * rows * longest
        self._tenants: dict[int, str] = {}  # by request id
        self._service: Counter[str] = Counter()
        self._started: set[int] = set()
        self._bases: dict[tuple[str, str], int] = {}
        self.most_apart = 0.0  # as a share of the bound

    def after(
        self,
        plan: StepPlan | None,
        outbox: Iterable[Outgoing],
        live: list[Request],
    ) -> None:
        for request in live:
            self._tenants[request.request_id] = request.tenant
        if plan is not None and plan.admitted:
            by_row = {r.row: r for r in live if r.row >= 0}
            for start in [by_row[admit.row] for admit in plan.admitted]:
                if start.request_id not in self._started:
                    self._started.add(start.request_id)
                    self._service[start.tenant] += start.num_prompt_tokens
        for outgoing in outbox:
            if isinstance(outgoing.message, Tokens):
                for row in outgoing.message.rows:
                    self._service[self._tenants[row.request_id]] += len(row.token_ids)
        waiting = sorted({r.tenant for r in live if r.state is RequestState.WAITING})
        pairs = [(a, b) for a in waiting for b in waiting if a < b]
        bases: dict[tuple[str, str], int] = {}
        for pair in pairs:
            apart = self._service[pair[0]] - self._service[pair[1]]
            bases[pair] = self._bases.get(pair, apart)
            self.most_apart = max(self.most_apart, abs(apart - bases[pair]) / self._bound)
            expect(abs(apart - bases[pair]) <= self._bound, "shares of two users drift apart")
        self._bases = bases


class Limits:
    """All of them for one scheduler process."""

    def __init__(self, config: ServeConfig, are_pages_plenty: bool) -> None:
        self.queue = QueueLimits(config)
        self.order = Order(config)
        self.shares = Shares(config) if are_pages_plenty else None

    def after(
        self,
        inbox: list[Message],
        plan: StepPlan | None,
        outbox: list[Outgoing],
        live: list[Request],
        is_lost: bool,
        memory: Memory,
    ) -> None:
        """A step was made: its arguments and results, and the requests that live after it."""
        messages = [outgoing.message for outgoing in outbox]
        finished = {m.request_id: m for m in messages if isinstance(m, Finished)}
        self.queue.after(inbox, finished, live)
        aborted: set[int] = set()
        for message in inbox:
            if isinstance(message, Abort):
                aborted.update(message.request_ids)
            elif isinstance(message, Submit):  # it may arrive after its abort
                aborted.discard(message.request_id)
        expect(aborted.isdisjoint(r.request_id for r in live), "a request outlives its abort")
        self.order.after(plan, live, is_lost, memory)
        if self.shares is not None:
            self.shares.after(plan, outbox, live)
