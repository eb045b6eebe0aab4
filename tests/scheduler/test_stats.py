"""The heartbeat: counts of plans and steps, and the state at one moment."""

import msgspec
import pytest
from fakes import FakeEngine
from glimmer.scheduler.draft import DraftPolicy
from glimmer.scheduler.stats import Stats
from glimmer.scheduler.worker_group import WorkerGroup
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import (
    BATCH_SIZES,
    STEP_SECONDS,
    Abort,
    Heartbeat,
    PrefillChunk,
    StepPlan,
)

MS = 1_000_000


def plan(decode: int, prefill: int = 0) -> StepPlan:
    chunks = [PrefillChunk(row, 0, [1], True) for row in range(prefill)]
    return StepPlan(0, 0, [], [], [], chunks, list(range(prefill, prefill + decode)))


def beat(stats: Stats) -> Heartbeat:
    config = ServeConfig()
    return stats.heartbeat(WorkerGroup(config, 8, 0), [], DraftPolicy(config), 0, 0, 0.0)


def test_steps_are_counted_by_kind_and_duration() -> None:
    stats = Stats()
    stats.add_step(plan(0, prefill=2), 10 * MS)
    stats.add_step(plan(3), 1 * MS)
    heartbeat = beat(stats)
    assert heartbeat.steps == 2
    assert heartbeat.prefill_steps.total_s == 0.010
    assert heartbeat.decode_steps.total_s == 0.001
    assert sum(heartbeat.prefill_steps.counts) == sum(heartbeat.decode_steps.counts) == 1
    assert heartbeat.decode_steps.counts[0] == 1  # at most 1.5 ms
    slow = heartbeat.prefill_steps.counts.index(1)
    assert STEP_SECONDS[slow - 1] < 0.010 <= STEP_SECONDS[slow]


def test_plans_are_counted_by_their_number_of_rows() -> None:
    stats = Stats()
    for sent in (plan(0, prefill=2), plan(3), plan(500)):
        stats.add_plan(sent)
    counts = beat(stats).batch_sizes
    assert [n for n, count in zip(BATCH_SIZES, counts, strict=False) if count] == [2, 3]
    assert counts[-1] == 1
    assert beat(stats).batch_rows == 505


def test_tokens_of_plans_and_gaps_between_tokens_are_counted() -> None:
    stats = Stats()
    stats.add_plan(plan(3, prefill=2))
    stats.add_plan(msgspec.structs.replace(plan(3), num_drafts=2))
    stats.add_step(plan(3, prefill=2), 10 * MS)
    stats.add_step(plan(4), 1 * MS)
    heartbeat = beat(stats)
    assert heartbeat.planned_tokens == 5 + 9
    assert heartbeat.step_tokens[:3] == [0, 1, 1]  # 2 to 8, 9 to 16
    assert sum(heartbeat.token_gaps.counts) == 7
    assert heartbeat.token_gaps.total_s == pytest.approx(0.034)


def test_the_times_of_a_request_add_up() -> None:
    engine = FakeEngine(64)
    request_id = engine.submit([1, 2, 3], 5)
    engine.finish()
    finished = engine.finished[request_id]
    assert finished.prefill_s > 0
    assert finished.decode_s > 0
    assert finished.decode_s == pytest.approx(4 * finished.prefill_s)


def test_a_request_that_never_ran_only_waited() -> None:
    engine = FakeEngine(64, running_max_req_size=1)
    engine.submit([1], 50)
    engine.turn(2)
    queued = engine.submit([2], 5)
    engine.turn(2)
    engine.tell(Abort([queued]))
    finished = engine.finished[queued]
    assert finished.queue_s > 0
    assert (finished.prefill_s, finished.decode_s) == (0, 0)


def test_a_step_begins_when_the_one_before_ends() -> None:
    engine = FakeEngine(64)
    engine.submit([1, 2, 3], 3)
    engine.turn()  # answers the prompt 10 ms after it was sent
    engine.now_ns += 5 * MS
    engine.turn()  # this plan was sent with the first one, but ran only from its answer on
    heartbeat = engine.core.heartbeat()
    assert heartbeat.prefill_steps.total_s == 0.010
    assert heartbeat.decode_steps.total_s == 0.015


def test_results_of_dead_workers_are_not_counted() -> None:
    engine = FakeEngine(64)
    engine.submit([1, 2, 3], 30)
    late = [engine.worker.run(sent) for sent in engine.in_flight]
    engine.start_workers(1)
    engine.tell(*late)
    assert engine.core.heartbeat().steps == 0


def test_a_heartbeat_keeps_its_own_counts() -> None:
    stats = Stats()
    first = beat(stats)
    stats.add_plan(plan(1))
    assert sum(first.batch_sizes) == 0


def test_states_and_counts_are_told() -> None:
    engine = FakeEngine(64, running_max_req_size=1)
    for _ in range(3):
        engine.submit(list(range(9)), 40)
    stats = Stats()
    stats.steps, stats.malformed_messages, stats.generated_tokens = 4, 2, 7
    drafts = DraftPolicy(ServeConfig(mtp_step=3))
    drafts.length = 3
    requests = engine.core._requests.values()
    heartbeat = stats.heartbeat(engine.core.workers, requests, drafts, 0, 5, 0.0)
    assert (heartbeat.steps, heartbeat.generated_tokens) == (4, 7)
    assert heartbeat.malformed_messages == 7
    assert (heartbeat.num_running, heartbeat.num_waiting, heartbeat.num_paused) == (1, 2, 0)
    assert (heartbeat.pages_total, heartbeat.worker_ready) == (64, True)
    assert heartbeat.draft_length == 3
