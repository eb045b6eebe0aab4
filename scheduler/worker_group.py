"""The worker group in use: its epoch, rows, pages, and the plans that it has not answered yet.

An epoch is one incarnation of the group: all ranks restart together. Messages of the launcher and
of the ranks arrive over different sockets, so a new group may be heard before the loss of the old
one is reported.
"""

from collections import deque

from ..shared.config import ServeConfig
from ..shared.messages import PeerLost, Ready, StepPlan, StepResult
from .batch import SentStep, fits
from .memory import Memory
from .request import Request, RequestState

MAX_IN_FLIGHT = 2  # plan n+1 is sent while n runs; more would only delay new requests
# A step counts as hung after this many times its expected duration, but not before these times.
_PATIENCE = 20
_LEAST_LIMIT_NS = 20e9
# After this it is called a stall: `/readiness` fails, and the launcher logs stacks.
_STALL_PATIENCE = 10
_LEAST_STALL_NS = 5e9
_FEW_STEPS = 4  # until so many are measured, nothing is expected
_FADE = 1 / 32  # of the distance to a shorter step, per step of that size
_LONG_PREFIX = 1024  # tokens after so many others cost twice as much, at most


class StepHistory:
    """How long the last steps took, by size, and therefore how long a step may take."""

    def __init__(self) -> None:
        self.new: deque[tuple[StepPlan, int]] = deque(maxlen=1000)  # answered steps and their ns
        self._slowest: dict[int, float] = {}  # log2 of the size -> ns, fading
        self._num_steps = 0
        self._last: deque[tuple[StepPlan, int]] = deque(maxlen=5)

    def take_in(self) -> None:
        """Learn from the `new` steps. Call it about every second."""
        self._last.extend(self.new)
        self._num_steps += len(self.new)
        for plan, taken_ns in self.new:
            size = _size(plan).bit_length()
            slowest = self._slowest.get(size, 0.0)
            self._slowest[size] = max(taken_ns, slowest - (slowest - taken_ns) * _FADE)
        self.new.clear()

    def expected_ns(self, plan: StepPlan) -> float | None:
        """The duration of the slowest of the last steps of this size or smaller. One that is
        larger than all of them may take longer in proportion. None: nothing is known yet."""
        self.take_in()
        if self._num_steps < _FEW_STEPS:
            return None
        size = _size(plan).bit_length()
        known = [measured for measured in self._slowest if measured <= size]
        if not known:
            return min(self._slowest.values())
        in_proportion = self._slowest[max(known)] * 2.0 ** (size - max(known))
        return max(in_proportion, *(self._slowest[measured] for measured in known))

    @property
    def last(self) -> str:
        """The last steps in words."""
        steps = [f"{describe(plan)}: {taken_ns / 1e9:.2f} s" for plan, taken_ns in self._last]
        return ", ".join(steps) or "none"


def _size(plan: StepPlan) -> int:
    """Tokens that the step computes; those after a long prefix count more."""
    size = 1 + len(plan.decode) * (1 + plan.num_drafts)
    for chunk in plan.prefill:
        count = len(chunk.token_ids)
        size += count + count * (chunk.start + count) // _LONG_PREFIX
    return size


def describe(plan: StepPlan) -> str:
    """A step in words, for logs."""
    num_tokens = sum(len(chunk.token_ids) for chunk in plan.prefill)
    farthest = max((chunk.start + len(chunk.token_ids) for chunk in plan.prefill), default=0)
    prompts = f"{num_tokens} prompt tokens up to position {farthest}, " if plan.prefill else ""
    return f"step {plan.step} ({prompts}{len(plan.decode)} decode rows, {plan.num_drafts} drafts)"


class WorkerGroup:
    """The ranks of one epoch. Epochs before `first_epoch` are dead."""

    def __init__(self, config: ServeConfig, max_rows: int, first_epoch: int) -> None:
        self._config = config
        self._max_rows = max_rows
        self._timeout_ns = config.step_timeout_s * 1e9
        self._least_limit_ns = min(_LEAST_LIMIT_NS, self._timeout_ns)
        self.epoch = -1  # the newest one that was heard of
        self._dead_epoch = first_epoch - 1  # this one is dead, and all before it
        self._next_step = 0  # number of the next plan
        self._history = StepHistory()
        self.forget()

    def forget(self) -> None:
        """The group is gone, with its pages and rows."""
        self.ready = False  # all ranks are ready
        self.failed = False  # reported to the launcher, which will say when the group is gone
        self._num_pages: dict[int, int] = {}  # by rank
        self.memory = Memory(0, self._config.page_size)
        self.free_rows: list[int] = []
        self._freed_rows: list[int] = []  # since the last plan
        self._in_flight: deque[SentStep] = deque()
        self.step_ns = 0  # how long the last answered step took
        self._progress_ns = 0  # when the workers could begin the oldest plan in flight

    # --- epochs --------------------------------------------------------------------------

    def is_newer(self, ready: Ready) -> bool:
        """Whether this rank belongs to a later group than the known one."""
        return ready.epoch > max(self.epoch, self._dead_epoch)

    def enroll(self, ready: Ready) -> bool:
        """A rank is ready. Returns True if now all are: memory and rows are new then."""
        if ready.epoch <= self._dead_epoch or ready.epoch < self.epoch:
            return False
        self.epoch = ready.epoch
        self._num_pages[ready.index] = ready.num_pages
        if self.ready or len(self._num_pages) < self._config.tp:
            return False
        self.ready = True
        self.memory = Memory(min(self._num_pages.values()), self._config.page_size)
        self.free_rows = list(range(self._max_rows - 1, -1, -1))
        return True

    def is_hit(self, lost: PeerLost) -> bool:
        """Whether the known group is the one that was lost. Later messages of a lost group are
        ignored."""
        epoch = self.epoch if lost.epoch < 0 else lost.epoch
        self._dead_epoch = max(self._dead_epoch, epoch)
        return epoch >= self.epoch

    # --- plans in flight -----------------------------------------------------------------

    @property
    def can_take_plan(self) -> bool:
        """Whether another plan may be sent."""
        return self.ready and not self.failed and len(self._in_flight) < MAX_IN_FLIGHT

    def new_plan(self) -> StepPlan:
        """An empty plan with the next step number. Its freed rows stay noted until it is sent."""
        return StepPlan(self.epoch, self._next_step, self._freed_rows, [], [], [], [])

    def sent(self, step: SentStep, now_ns: int) -> None:
        """A plan was sent."""
        if not self._in_flight:
            self._progress_ns = now_ns
        self._in_flight.append(step)
        self._freed_rows = []
        self._next_step += 1

    def answered(self, result: StepResult, now_ns: int) -> SentStep | None:
        """Remove the oldest plan in flight and return it, if `result` is its answer."""
        if not self._in_flight or not fits(self._in_flight[0], result):
            return None
        self.step_ns = now_ns - self._progress_ns
        self._progress_ns = now_ns
        self._history.new.append((self._in_flight[0].plan, self.step_ns))
        return self._in_flight.popleft()

    def void_plans(self) -> None:
        """The plans in flight build on a step that failed: their results will not be read."""
        void = [SentStep(step.plan, [], [], is_void=True) for step in self._in_flight]
        self._in_flight = deque(void)

    def is_overdue(self, now_ns: int) -> bool:
        """Whether the workers count as hung."""
        may_be = self._in_flight and now_ns - self._progress_ns > self._least_limit_ns
        return bool(may_be and self.overdue(now_ns))

    def overdue(self, now_ns: int) -> str:
        """Why the workers count as hung; "" if they do not. A step may take `_PATIENCE` times as
        long as expected, `step_timeout_s` at most, also if nothing is known about it."""
        age_ns, plan = self._age_ns(now_ns), self._in_flight[0].plan
        limit_ns, expected_ns = self._timeout_ns, self._history.expected_ns(plan)
        if expected_ns is not None:
            limit_ns = min(limit_ns, max(_LEAST_LIMIT_NS, _PATIENCE * expected_ns))
        if age_ns <= limit_ns:
            return ""
        return (
            f"a step took longer than {limit_ns / 1e9:.0f} s; {describe(plan)} has no answer; "
            f"the last steps: {self._history.last}"
        )

    def stall(self, now_ns: int) -> str:
        """Says which step takes far longer than expected; "" if none does. Call it every second."""
        self._history.take_in()
        age_ns = self._age_ns(now_ns)
        if age_ns <= _LEAST_STALL_NS:
            return ""
        plan = self._in_flight[0].plan
        expected_ns = self._history.expected_ns(plan)
        if expected_ns is None or age_ns <= _STALL_PATIENCE * expected_ns:
            return ""
        return f"{describe(plan)} has run for {age_ns / 1e9:.0f} s, {expected_ns / 1e9:.1f} s usual"

    def _age_ns(self, now_ns: int) -> int:
        """How long the oldest plan in flight has been running."""
        return now_ns - self._progress_ns if self._in_flight else 0

    # --- rows ----------------------------------------------------------------------------

    def release_row(self, request: Request) -> None:
        """Take row and pages from the request."""
        self.memory.release(request.table)
        self._freed_rows.append(request.row)
        self.free_rows.append(request.row)
        request.row = -1

    def check_integrity(self, running: list[Request]) -> None:
        """Raise AssertionError unless rows and pages are free or held by `running`, once."""
        self.memory.check_integrity(request.table for request in running)
        rows = sorted([r.row for r in running] + self.free_rows)
        assert not self.ready or rows == list(range(self._max_rows)), "a row is lost or held twice"
        most = {request.request_id: len(request.tokens) for request in running}
        for step in self._in_flight:
            if step.is_void:
                continue
            for request, width in zip(step.sampling, step.widths(), strict=True):
                most[request.request_id] = most.get(request.request_id, 0) + width
        for request in running:
            bounds = [len(request.tokens), request.min_planned, most[request.request_id]]
            assert bounds == sorted(bounds), f"tokens known and planned: {bounds}"
            assert request.max_planned == bounds[-1], "tokens planned at most"
            assert request.table.num_kv <= bounds[-1], "KV planned at most"
            if request.state is not RequestState.PREFILL:
                assert request.table.num_kv < bounds[-1], "KV of a token that is being sampled"
