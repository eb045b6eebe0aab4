"""What the scheduler knows of the other processes: the worker group of the moment and the
incarnations of the frontends. Messages of different peers arrive over different sockets, so a new
process may be heard before the loss of the old one is."""

from collections import deque
from dataclasses import dataclass

from ..shared.config import ServeConfig
from ..shared.messages import Message, PeerLost, Ready, StepPlan, StepResult
from .admission import StepLimits
from .memory import Memory
from .request import Request, RequestState
from .results import Flight, fits

MAX_IN_FLIGHT = 2  # plan n+1 is sent while n runs; more would only delay new requests


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message and its destination: frontend `index`, worker rank `index` or the launcher (0)."""

    to: str  # "frontend" | "worker" | "launcher"
    index: int
    message: Message


class WorkerGroup:
    """The ranks of one epoch: readiness, rows, pages, and the plans that they have not answered."""

    def __init__(self, config: ServeConfig, limits: StepLimits, first_epoch: int) -> None:
        self._config = config
        self._max_rows = limits.max_rows
        self.epoch = -1  # the newest one seen
        self._dead_epoch = first_epoch - 1  # and all before
        self._num_steps = 0
        self.forget()

    def forget(self) -> None:
        """The group is gone, with all it held."""
        self.ready = False  # all ranks are
        self.failed = False  # reported to the launcher; it will say when the group is gone
        self._num_pages: dict[int, int] = {}  # by rank
        self.memory = Memory(0, self._config.page_size)
        self.free_rows: list[int] = []
        self._freed_rows: list[int] = []  # since the last plan
        self._in_flight: deque[Flight] = deque()
        self.step_ns = 0  # how long the last answered step took
        self._progress_ns = 0  # since when the oldest plan in flight is the workers' next one

    def is_newer(self, ready: Ready) -> bool:
        """Whether this rank belongs to a later group than the one known."""
        return ready.epoch > max(self.epoch, self._dead_epoch)

    def enroll(self, ready: Ready) -> bool:
        """A rank is ready. True if that completes the group: memory and rows are new then."""
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

    def ready_message(self, max_req_total_len: int) -> Ready:
        """What frontends and launcher hear of a complete group."""
        return Ready("scheduler", 0, self.epoch, self.memory.num_pages, max_req_total_len)

    def is_hit(self, lost: PeerLost) -> bool:
        """Whether this loss is about the group known; its late messages are ignored from now."""
        epoch = self.epoch if lost.epoch < 0 else lost.epoch
        self._dead_epoch = max(self._dead_epoch, epoch)
        return epoch >= self.epoch

    # --- plans in flight -----------------------------------------------------------------

    @property
    def can_take_plan(self) -> bool:
        """Whether another plan may be sent."""
        return self.ready and not self.failed and len(self._in_flight) < MAX_IN_FLIGHT

    @property
    def next_step(self) -> int:
        """Number of the next plan."""
        return self._num_steps

    @property
    def freed_rows(self) -> list[int]:
        """Rows to name in the next plan's `freed`."""
        return self._freed_rows

    def sent(self, plan: StepPlan, flight: Flight, now_ns: int) -> None:
        """`plan` is on its way."""
        assert plan.step == self._num_steps, "plans are numbered in order"
        if not self._in_flight:
            self._progress_ns = now_ns
        self._in_flight.append(flight)
        self._freed_rows = []
        self._num_steps += 1

    def answered(self, result: StepResult, now_ns: int) -> Flight | None:
        """What the oldest plan in flight was, if `result` answers it."""
        if not self._in_flight or not fits(self._in_flight[0], result):
            return None
        self.step_ns = now_ns - self._progress_ns
        self._progress_ns = now_ns
        return self._in_flight.popleft()

    def void_plans(self) -> None:
        """The plans in flight build on a step that failed: their results will say nothing."""
        self._in_flight = deque(Flight(f.step, [], [], is_void=True) for f in self._in_flight)

    def is_overdue(self, now_ns: int) -> bool:
        """Whether the workers have been silent on a plan for longer than `step_timeout_s`."""
        timeout_ns = self._config.step_timeout_s * 1e9
        return bool(self._in_flight) and now_ns - self._progress_ns > timeout_ns

    def release_row(self, request: Request) -> None:
        """Take row and pages from the request."""
        self.memory.release(request)
        self._freed_rows.append(request.row)
        self.free_rows.append(request.row)
        request.row = -1

    def flush_cache(self) -> None:
        """Free the pages that the prefix cache alone holds."""
        self.memory.cache.evict(self.memory.cache.num_evictable)

    def check_integrity(self, running: list[Request]) -> None:
        """Raise AssertionError unless rows and pages are free or held by `running`, once."""
        self.memory.check_integrity(running)
        rows = sorted([r.row for r in running] + self.free_rows)
        assert not self.ready or rows == list(range(self._max_rows)), "a row is lost or held twice"
        most = {request.request_id: len(request.tokens) for request in running}
        for flight in self._in_flight:
            for request, width in zip(flight.sampling, flight.widths(), strict=True):
                most[request.request_id] = most.get(request.request_id, 0) + width
        for request in running:
            bounds = [len(request.tokens), request.num_planned, most[request.request_id]]
            assert bounds == sorted(bounds), f"tokens known and planned: {bounds}"
            assert request.max_planned == bounds[-1], "tokens planned at most"
            assert request.num_kv <= bounds[-1], "KV planned at most"
            if request.state is not RequestState.PREFILL:
                assert request.num_kv < bounds[-1], "KV of a token that is being sampled"


class Frontends:
    """Which incarnation of each frontend is alive."""

    def __init__(self) -> None:
        self._pids: dict[int, int] = {}
        self._late_losses: dict[int, int] = {}  # replaced before their PeerLost came

    def greeted(self, index: int, pid: int) -> bool:
        """A frontend said hello. True if it replaces one whose loss was not reported yet."""
        replaces = self._pids.get(index, pid) != pid
        if replaces:
            self._late_losses[index] = self._late_losses.get(index, 0) + 1
        self._pids[index] = pid
        return replaces

    def lost(self, index: int) -> bool:
        """A loss was reported. False if the one that was lost has been replaced already."""
        if self._late_losses.get(index):
            self._late_losses[index] -= 1
            return False
        self._pids.pop(index, None)
        return True
