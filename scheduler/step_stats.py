"""What the steps of the workers cost, counted for the heartbeat.

A step takes from when the workers could begin it, that is when its plan was sent or the step before
was answered, to its own answer.
"""

from bisect import bisect_left

import msgspec

from ..shared.messages import BATCH_SIZES, STEP_SECONDS, Heartbeat, StepPlan, StepResult, StepTimes


class StepStats:
    """Counts since the scheduler started. Times are `time.monotonic_ns`."""

    def __init__(self) -> None:
        self._flying: dict[tuple[int, int], tuple[int, bool]] = {}  # epoch, step -> sent, prefill
        self._answered_ns = 0
        self._counts = [[0] * (len(STEP_SECONDS) + 1) for _ in range(2)]  # decode, prefill
        self._total_ns = [0, 0]
        self._sizes = [0] * (len(BATCH_SIZES) + 1)
        self._rows = 0

    def sent(self, plan: StepPlan, now_ns: int) -> None:
        """A plan leaves for the workers."""
        for epoch, step in [key for key in self._flying if key[0] != plan.epoch]:
            del self._flying[epoch, step]  # never to be answered
        self._flying[plan.epoch, plan.step] = (now_ns, bool(plan.prefill))
        rows = len(plan.prefill) + len(plan.decode)
        self._sizes[bisect_left(BATCH_SIZES, rows)] += 1
        self._rows += rows

    def answered(self, result: StepResult, now_ns: int) -> None:
        """The workers' result is here; one that nobody waits for is ignored."""
        flying = self._flying.pop((result.epoch, result.step), None)
        if flying is None:
            return
        sent_ns, is_prefill = flying
        taken_ns = now_ns - max(sent_ns, self._answered_ns)
        self._counts[is_prefill][bisect_left(STEP_SECONDS, taken_ns / 1e9)] += 1
        self._total_ns[is_prefill] += taken_ns
        self._answered_ns = now_ns

    def fill(self, heartbeat: Heartbeat) -> Heartbeat:
        """The heartbeat with these counts in it."""
        decode, prefill = (
            StepTimes(list(counts), total / 1e9)
            for counts, total in zip(self._counts, self._total_ns, strict=True)
        )
        return msgspec.structs.replace(
            heartbeat,
            prefill_steps=prefill,
            decode_steps=decode,
            batch_sizes=list(self._sizes),
            batch_rows=self._rows,
        )
