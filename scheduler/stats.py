"""The heartbeat: counts since the scheduler started, and the state at this moment.

A step takes from when the workers could begin it, that is when its plan was sent or the step before
was answered, to its own answer.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from ..shared.messages import (
    BATCH_SIZES,
    STEP_SECONDS,
    STEP_TOKENS,
    Heartbeat,
    StepPlan,
    StepTimes,
)
from .draft import DraftPolicy
from .request import Request, RequestState
from .worker_group import WorkerGroup


class Stats:
    """Counts since the scheduler started. The names are those of the heartbeat's fields."""

    def __init__(self) -> None:
        self.steps = 0  # results received
        self.malformed_messages = 0
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.generated_tokens = 0
        self.decoded_rows = 0
        self._batch_sizes = [0] * (len(BATCH_SIZES) + 1)
        self._batch_rows = 0
        self._step_counts = [[0] * (len(STEP_SECONDS) + 1) for _ in range(2)]  # decode, prefill
        self._step_ns = [0, 0]
        self._step_tokens = [0] * (len(STEP_TOKENS) + 1)
        self._planned_tokens = 0
        self._gap_counts = [0] * (len(STEP_SECONDS) + 1)
        self._gap_ns = 0

    def add_plan(self, plan: StepPlan) -> None:
        """A plan was sent."""
        num_rows = len(plan.prefill) + len(plan.decode)
        self._batch_sizes[bisect_left(BATCH_SIZES, num_rows)] += 1
        self._batch_rows += num_rows
        num_tokens = len(plan.decode) * (1 + plan.num_drafts)
        for chunk in plan.prefill:
            num_tokens += len(chunk.token_ids)
        self._step_tokens[bisect_left(STEP_TOKENS, num_tokens)] += 1
        self._planned_tokens += num_tokens

    def add_step(self, plan: StepPlan, taken_ns: int) -> None:
        """A plan was answered; the step took `taken_ns`. A decode row is in every step, so that is
        also the time since its last token."""
        self.steps += 1
        is_prefill, num_decodes = bool(plan.prefill), len(plan.decode)
        bucket = bisect_left(STEP_SECONDS, taken_ns / 1e9)
        self._step_counts[is_prefill][bucket] += 1
        self._step_ns[is_prefill] += taken_ns
        self._gap_counts[bucket] += num_decodes
        self._gap_ns += num_decodes * taken_ns

    def heartbeat(
        self,
        workers: WorkerGroup,
        requests: Iterable[Request],
        drafts: DraftPolicy,
        estimated_peak_tokens: int,
        malformed: int,
        step_us: float,
    ) -> Heartbeat:
        """The message, for all live `requests`. `malformed` messages are added to those counted
        here; `step_us` is the mean time of a scheduling step."""
        states = Counter(r.state if r.row < 0 else None for r in requests)  # None: running
        decode, prefill = (
            StepTimes(list(counts), total_ns / 1e9)
            for counts, total_ns in zip(self._step_counts, self._step_ns, strict=True)
        )
        return Heartbeat(
            steps=self.steps,
            num_running=states[None],
            num_waiting=states[RequestState.WAITING],
            num_paused=states[RequestState.PAUSED],
            pages_total=workers.memory.num_pages,
            pages_free=workers.memory.pool.num_free,
            pages_cached=workers.memory.cache.num_evictable,
            worker_ready=workers.ready and not workers.failed,
            preemptions=self.preemptions,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            generated_tokens=self.generated_tokens,
            malformed_messages=self.malformed_messages + malformed,
            estimated_peak_tokens=estimated_peak_tokens,
            step_us=step_us,
            prefill_steps=prefill,
            decode_steps=decode,
            batch_sizes=list(self._batch_sizes),
            batch_rows=self._batch_rows,
            draft_length=drafts.length,
            decoded_rows=self.decoded_rows,
            drafts_offered=list(drafts.offered),
            drafts_accepted=list(drafts.accepted),
            step_tokens=list(self._step_tokens),
            planned_tokens=self._planned_tokens,
            token_gaps=StepTimes(list(self._gap_counts), self._gap_ns / 1e9),
        )
