"""Epochs of the worker group, and results that must not be read."""

import pytest
from fakes import FakeEngine
from glimmer.scheduler.core import Outgoing, Scheduler
from glimmer.scheduler.worker_group import StepHistory
from glimmer.shared.messages import (
    Hello,
    PeerLost,
    PrefillChunk,
    Ready,
    RowResult,
    StepPlan,
    StepResult,
    WorkerFailed,
)


def of_type(engine: FakeEngine, kind: type) -> list[Outgoing]:
    return [o for o in engine.sent if isinstance(o.message, kind)]


def test_ready_is_announced_to_all_when_the_last_rank_is_ready() -> None:
    engine = FakeEngine(64, tp=2, httpserver_workers=2)
    ready = of_type(engine, Ready)
    assert [(o.to, o.index) for o in ready] == [("launcher", 0), ("frontend", 0), ("frontend", 1)]
    engine.tell(PeerLost("worker", 1, "killed"), Ready("worker", 0, 1, 50))
    assert len(of_type(engine, Ready)) == 3
    engine.tell(Ready("worker", 1, 1, 40))
    message = of_type(engine, Ready)[-1].message
    assert isinstance(message, Ready)
    assert (message.epoch, message.num_pages, message.max_req_total_len) == (1, 40, 39 * 4)


def test_a_restarted_scheduler_ignores_workers_of_the_time_before() -> None:
    config = FakeEngine(64).config
    core = Scheduler(config, first_epoch=3)
    core.step(1, [Ready("worker", 0, 2, 64)])
    assert not core.workers.ready
    core.step(2, [Ready("worker", 0, 3, 64)])
    assert core.workers.ready


def test_a_frontend_that_greets_later_hears_ready_at_once() -> None:
    engine = FakeEngine(64)
    engine.tell(Hello("frontend", 0, 77, "hash"))
    assert of_type(engine, Ready)[-1].to == "frontend"
    assert len(of_type(engine, Ready)) == 3


def test_a_result_of_a_dead_epoch_changes_nothing() -> None:
    engine = FakeEngine(64)
    submit = engine.submission([1, 2], 6)
    engine.tell(submit)
    late = [engine.worker.run(plan) for plan in engine.in_flight]
    engine.tell(PeerLost("worker", 0, "killed", 0), late[0])
    engine.start_workers(1)
    engine.tell(late[1])
    engine.finish()
    assert engine.tokens[submit.request_id] == engine.right_answer(submit)
    assert not of_type(engine, WorkerFailed)


def test_a_new_group_may_be_heard_of_before_the_loss_of_the_old_one() -> None:
    engine = FakeEngine(64)
    submit = engine.submission([1, 2], 9)
    engine.tell(submit)
    engine.turn(3)
    engine.start_workers(1)
    engine.turn(2)
    engine.tell(PeerLost("worker", 0, "killed", 0), PeerLost("worker", 1, "killed", 0))
    engine.finish()
    assert engine.tokens[submit.request_id] == engine.right_answer(submit)
    engine.tell(Ready("worker", 0, 0, 64))  # and its last words later still
    assert engine.core.workers.epoch == 1


@pytest.mark.parametrize(
    "result",
    [
        StepResult(0, 7, [RowResult([1])]),
        StepResult(0, 0, []),
        StepResult(0, 0, [RowResult([1]), RowResult([1])]),
        StepResult(0, 0, [RowResult([])]),
    ],
)
def test_a_result_that_fits_no_plan_is_reported_and_planning_stops(result: StepResult) -> None:
    engine = FakeEngine(64)
    engine.submit([1, 2], 6)
    engine.tell(result, result)
    (failed,) = of_type(engine, WorkerFailed)
    assert failed.to == "launcher"
    num_plans = len(engine.plans)
    engine.tell()
    assert len(engine.plans) == num_plans
    engine.tell(PeerLost("worker", 0, "restarted", 0))
    engine.start_workers(1)
    engine.finish()


def test_a_silent_group_is_reported_once_but_an_idle_one_never() -> None:
    engine = FakeEngine(64, step_timeout_s=5.0)
    engine.now_ns += 100_000_000_000
    engine.tell()
    assert not of_type(engine, WorkerFailed)
    engine.submit([1, 2], 6)
    engine.now_ns += 4_900_000_000
    engine.turn()
    engine.now_ns += 4_900_000_000  # each step has its own time
    engine.tell()
    assert not of_type(engine, WorkerFailed)
    engine.now_ns += 200_000_000
    engine.tell()
    engine.tell()
    assert len(of_type(engine, WorkerFailed)) == 1


SECOND = 1_000_000_000


def test_a_hung_step_is_found_by_what_such_steps_usually_take() -> None:
    engine = FakeEngine(64, max_req_total_len=4000, step_timeout_s=300.0)
    engine.submit([1, 2], 100)
    engine.turn(10)  # of 10 ms each
    engine.now_ns += 4 * SECOND
    engine.tell()
    assert engine.core.heartbeat().stall == ""
    engine.now_ns += 2 * SECOND
    engine.tell()
    stall = engine.core.heartbeat().stall
    assert "1 decode rows" in stall
    assert "has run for 6 s, 0.0 s usual" in stall
    engine.now_ns += 13 * SECOND
    engine.tell()
    assert not of_type(engine, WorkerFailed)
    engine.now_ns += 2 * SECOND
    engine.tell()
    (failed,) = of_type(engine, WorkerFailed)
    assert isinstance(failed.message, WorkerFailed)
    assert "a step took longer than 20 s; step " in failed.message.reason
    assert "the last steps: step " in failed.message.reason
    assert ": 0.01 s" in failed.message.reason


def test_the_first_steps_and_a_slow_machine_have_more_time() -> None:
    engine = FakeEngine(64, step_timeout_s=300.0)
    engine.submit([1, 2], 100)
    for _ in range(8):
        engine.now_ns += 30 * SECOND  # the first ones: nothing is known; then this is usual
        engine.tell()
        engine.turn()
    engine.now_ns += 290 * SECOND
    engine.tell()
    assert not of_type(engine, WorkerFailed)
    assert not engine.core.heartbeat().stall
    engine.now_ns += 20 * SECOND
    engine.tell()
    assert len(of_type(engine, WorkerFailed)) == 1


def plan_of(num_tokens: int, start: int = 0, rows: int = 0) -> StepPlan:
    chunk = PrefillChunk(0, start, [0] * num_tokens, sample=True)
    return StepPlan(0, 0, [], [], [], [chunk] if num_tokens else [], list(range(rows)))


def add(history: StepHistory, plan: StepPlan, taken_ns: int) -> None:
    history.new.append((plan, taken_ns))
    history.take_in()


def test_a_larger_step_than_any_before_may_take_longer_in_proportion() -> None:
    history = StepHistory()
    for _ in range(3):
        add(history, plan_of(0, rows=1), 10_000_000)
    assert history.expected_ns(plan_of(0, rows=1)) is None
    add(history, plan_of(64), SECOND // 10)
    decode, prompt, long_prompt, late = (
        history.expected_ns(plan)
        for plan in (plan_of(0, rows=1), plan_of(64), plan_of(8192), plan_of(8192, 100_000))
    )
    assert decode == 10_000_000
    assert prompt == SECOND // 10
    assert long_prompt >= 128 * prompt
    assert late >= 8 * long_prompt
    for _ in range(300):  # one slow step is forgotten
        add(history, plan_of(64), SECOND // 100)
    assert history.expected_ns(plan_of(64)) < SECOND // 50
    assert history.expected_ns(plan_of(0, rows=40)) >= 10_000_000
