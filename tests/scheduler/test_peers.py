"""Processes die and return in any order; the scheduler follows the right incarnation."""

import pytest
from fakes import FakeEngine
from glimmer.scheduler.core import Scheduler
from glimmer.scheduler.peers import Outgoing
from glimmer.shared.messages import Hello, PeerLost, Ready, RowResult, StepResult, WorkerFailed


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


def test_a_lost_worker_group_is_replayed_without_a_changed_token() -> None:
    engine = FakeEngine(64)
    submits = [engine.submission([i, 1, 2], 12, temperature=1.0) for i in range(4)]
    engine.tell(*submits)
    engine.turn(5)
    engine.tell(PeerLost("worker", 0, "killed", 0))
    assert engine.core.heartbeat().num_paused == 4
    assert not engine.core.heartbeat().worker_ready
    engine.start_workers(1)
    engine.finish()
    for submit in submits:
        assert engine.tokens[submit.request_id] == engine.right_answer(submit)


def test_a_request_that_saw_two_groups_die_is_given_up() -> None:
    engine = FakeEngine(64, running_max_req_size=1)
    poison = engine.submit([1], 50)
    waiting = engine.submit([2], 3)
    for epoch in (1, 2):
        engine.turn(2)
        engine.tell(PeerLost("worker", 0, "killed", epoch - 1))
        assert (poison in engine.finished) == (epoch == 2)
        engine.start_workers(epoch)
    assert engine.finished[poison].reason == "unavailable"
    engine.finish()
    assert engine.finished[waiting].reason == "length", "one that never ran is not to blame"


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


def test_a_smaller_group_ends_what_no_longer_fits_and_refuses_what_cannot() -> None:
    engine = FakeEngine(64, running_max_req_size=1)
    running = engine.submit([1] * 10, 100)
    queued = engine.submit([2] * 100, 5)
    engine.turn(40)
    engine.tell(PeerLost("worker", 0, "killed", 0))
    engine.start_workers(1, num_pages=10)
    assert engine.finished[running].reason == "length"
    assert engine.finished[queued].reason == "invalid"


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


def test_a_lost_frontends_requests_end_in_silence() -> None:
    engine = FakeEngine(64, httpserver_workers=2)
    mine = [engine.submit([1], 50, frontend=0), engine.submit([2], 50, frontend=0)]
    other = engine.submit([3], 5, frontend=1)
    engine.turn(2)
    engine.tell(PeerLost("frontend", 0, "killed"))
    assert engine.core.num_live == 1
    engine.finish()
    assert other in engine.finished
    assert not set(mine) & set(engine.finished)


def test_losses_reported_after_the_replacements_greeted_hit_nobody_new() -> None:
    engine = FakeEngine(64)
    engine.tell(Hello("frontend", 0, 1, "hash"))
    engine.submit([1], 50)
    engine.tell(Hello("frontend", 0, 2, "hash"))
    assert engine.core.num_live == 0
    engine.submit([2], 50)
    engine.tell(Hello("frontend", 0, 3, "hash"))
    alive = engine.submit([3], 5)
    engine.tell(PeerLost("frontend", 0, "killed"), PeerLost("frontend", 0, "killed"))
    engine.finish()
    assert engine.finished[alive].reason == "length"
    engine.submit([4], 50)
    engine.tell(PeerLost("frontend", 0, "killed"))
    assert engine.core.num_live == 0


def test_a_flushed_cache_keeps_what_running_requests_use() -> None:
    engine = FakeEngine(64)
    first = engine.submission([1] * 12, 4)
    engine.tell(first)
    engine.finish()
    running = engine.submission([2] * 12, 40)
    engine.tell(running)
    engine.turn(3)
    assert engine.core.heartbeat().pages_cached > 0
    engine.core.workers.flush_cache()
    beat = engine.core.heartbeat()
    assert (beat.pages_cached, beat.num_running) == (0, 1)
    engine.core.check_integrity()
    engine.finish()
    assert engine.tokens[running.request_id] == engine.right_answer(running)
