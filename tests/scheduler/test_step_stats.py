"""Counts of steps, from plans and results."""

from glimmer.scheduler.step_stats import StepStats
from glimmer.shared.messages import (
    BATCH_SIZES,
    STEP_SECONDS,
    Heartbeat,
    PrefillChunk,
    StepPlan,
    StepResult,
)

BEAT = Heartbeat(0, 0, 0, 0, 8, 8, 0, True, 0, 0, 0, 0, 0)
MS = 1_000_000


def plan(step: int, decode: int, prefill: int = 0, epoch: int = 0) -> StepPlan:
    chunks = [PrefillChunk(row, 0, [1], True) for row in range(prefill)]
    return StepPlan(epoch, step, [], [], [], chunks, list(range(prefill, prefill + decode)))


def test_a_step_begins_when_the_one_before_ends() -> None:
    stats = StepStats()
    stats.sent(plan(0, 0, prefill=2), 0)
    stats.sent(plan(1, 3), 1 * MS)
    stats.answered(StepResult(0, 0, []), 10 * MS)
    stats.answered(StepResult(0, 1, []), 11 * MS)
    beat = stats.fill(BEAT)
    assert beat.prefill_steps.total_s == 0.010
    assert beat.decode_steps.total_s == 0.001
    assert (sum(beat.prefill_steps.counts), sum(beat.decode_steps.counts)) == (1, 1)
    assert beat.decode_steps.counts[0] == 1  # at most 1.5 ms
    slow = beat.prefill_steps.counts.index(1)
    assert STEP_SECONDS[slow - 1] < 0.010 <= STEP_SECONDS[slow]
    assert [n for n, count in zip((*BATCH_SIZES, 0), beat.batch_sizes, strict=True) if count] == [
        2,
        3,
    ]
    assert beat.batch_rows == 5


def test_large_batches_are_in_the_last_bucket() -> None:
    stats = StepStats()
    stats.sent(plan(0, 500), 0)
    assert stats.fill(BEAT).batch_sizes[-1] == 1


def test_results_that_nobody_waits_for_are_not_counted() -> None:
    stats = StepStats()
    stats.sent(plan(0, 1), 0)
    stats.sent(plan(0, 1, epoch=1), 5 * MS)  # the next group: the first plan is lost
    stats.answered(StepResult(0, 0, []), 6 * MS)
    stats.answered(StepResult(1, 7, []), 6 * MS)
    assert sum(stats.fill(BEAT).decode_steps.counts) == 0
    stats.answered(StepResult(1, 0, []), 7 * MS)
    assert sum(stats.fill(BEAT).decode_steps.counts) == 1


def test_a_heartbeat_keeps_its_own_counts() -> None:
    stats = StepStats()
    first = stats.fill(BEAT)
    stats.sent(plan(0, 1), 0)
    assert sum(first.batch_sizes) == 0
    assert first.pages_total == BEAT.pages_total
