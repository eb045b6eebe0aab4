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


class WorkerGroup:
    """The ranks of one epoch. Epochs before `first_epoch` are dead."""

    def __init__(self, config: ServeConfig, max_rows: int, first_epoch: int) -> None:
        self._config = config
        self._max_rows = max_rows
        self._timeout_ns = config.step_timeout_s * 1e9
        self.epoch = -1  # the newest one that was heard of
        self._dead_epoch = first_epoch - 1  # this one is dead, and all before it
        self._next_step = 0  # number of the next plan
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
        return self._in_flight.popleft()

    def void_plans(self) -> None:
        """The plans in flight build on a step that failed: their results will not be read."""
        void = [SentStep(step.plan, [], [], is_void=True) for step in self._in_flight]
        self._in_flight = deque(void)

    def is_overdue(self, now_ns: int) -> bool:
        """Whether a plan has had no answer for longer than `step_timeout_s`."""
        return bool(self._in_flight) and now_ns - self._progress_ns > self._timeout_ns

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
