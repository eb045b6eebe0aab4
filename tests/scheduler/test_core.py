"""A request's life through `Scheduler.step`: one Finished each, aborts at any moment, drain."""

import pytest
from fakes import FakeEngine
from glimmer.shared.messages import Abort, PeerLost, Progress, Ready, Shutdown, StepResult, Tokens


def test_a_request_gets_its_tokens_then_its_end() -> None:
    engine = FakeEngine(64)
    submit = engine.submission([1, 2, 3], 5)
    engine.tell(submit)
    engine.finish()
    assert engine.tokens[submit.request_id] == engine.right_answer(submit)
    finished = engine.finished[submit.request_id]
    assert (finished.reason, finished.num_prompt_tokens, finished.num_output_tokens) == (
        "length",
        3,
        5,
    )
    assert isinstance(engine.sent[-2].message, Tokens)
    assert engine.sent[-1].message is finished


def test_the_next_plan_is_made_before_the_result_of_the_last() -> None:
    engine = FakeEngine(64)
    engine.submit([1, 2, 3], 10)
    assert [len(p.decode) for p in engine.plans] == [0, 1]
    assert len(engine.in_flight) == 2
    while engine.core.num_live:
        engine.turn()
        assert len(engine.in_flight) <= 2


@pytest.mark.parametrize("turns", range(9))
def test_an_abort_at_any_moment_frees_everything_at_once(turns: int) -> None:
    engine = FakeEngine(64, page_size=4, chunked_prefill_size=8, running_max_req_size=1)
    first = engine.submit(list(range(20)), 4)
    second = engine.submit(list(range(30)), 4)  # waits
    engine.turn(turns)
    engine.tell(Abort([first, 12345, first]))
    engine.tell(Abort([second]))
    assert engine.core.num_live == 0
    beat = engine.core.heartbeat()
    assert beat.pages_free + beat.pages_cached == 64
    engine.turn(3)
    assert set(engine.finished) == {first, second}
    assert engine.finished[second].reason == "abort"
    assert engine.finished[first].reason == ("abort" if turns < 6 else "length")
    again = engine.submission(list(range(20)), 4)  # the cached pages are correct
    engine.tell(again)
    engine.finish()
    assert engine.tokens[again.request_id] == engine.right_answer(again)


def test_an_abort_in_the_step_that_finishes_gives_one_end() -> None:
    engine = FakeEngine(64)
    request_id = engine.submit([1], 2)
    engine.turn()
    result = engine.worker.run(engine.in_flight.pop(0))
    engine.tell(Abort([request_id]), result)
    assert engine.finished[request_id].reason == "abort"
    assert len(engine.tokens[request_id]) == 1


def test_a_repeated_submit_of_a_live_request_is_ignored() -> None:
    engine = FakeEngine(64)
    submit = engine.submission([1, 2], 4)
    engine.tell(submit, submit)
    engine.tell(submit)
    engine.finish()
    assert engine.tokens[submit.request_id] == engine.right_answer(submit)
    assert engine.core.heartbeat().malformed_messages == 2


def test_a_message_that_is_not_for_the_scheduler_is_counted() -> None:
    engine = FakeEngine(64)
    engine.tell(Progress("worker", 0, "loading"), Ready("frontend", 0))
    assert engine.core.heartbeat(malformed=3).malformed_messages == 5


def test_requests_wait_until_the_workers_are_ready() -> None:
    engine = FakeEngine(64)
    engine.tell(PeerLost("worker", 0, "killed", 0))
    submit = engine.submission([1, 2], 4)
    engine.tell(submit)
    engine.turn(5)
    assert engine.core.heartbeat().num_waiting == 1
    engine.start_workers(1)
    engine.finish()
    assert engine.tokens[submit.request_id] == engine.right_answer(submit)


def test_a_failed_step_ends_its_requests_and_no_others() -> None:
    engine = FakeEngine(64, running_max_req_size=3)
    shared = list(range(12))
    first = [engine.submit([*shared, i], 50) for i in range(2)]
    engine.turn(4)
    engine.worker.fail(engine.in_flight[0])
    next_one = engine.submission([*shared, 7], 5)  # on pages in the cache, beside the failed step
    queued = engine.submission([*shared, 8], 5)
    noise = StepResult(0, engine.in_flight[0].step, [], error="no memory")
    engine.in_flight.pop(0)
    (late,) = engine.in_flight  # sent before the failure is heard of
    engine.tell(next_one, queued, noise)
    assert {engine.finished[i].reason for i in first} == {"error"}
    assert {engine.finished[i].message for i in first} == {"no memory"}
    engine.in_flight.remove(late)
    engine.tell(engine.worker.fail(late))
    engine.finish()
    for submit in (next_one, queued):
        assert engine.tokens[submit.request_id] == engine.right_answer(submit)
    assert engine.core.heartbeat().num_running == 0


@pytest.mark.parametrize("drain_s", [0.0, 0.05])
def test_what_still_runs_at_the_drain_deadline_is_ended(drain_s: float) -> None:
    engine = FakeEngine(64, running_max_req_size=1)
    ids = [engine.submit([i], 1000) for i in range(3)]
    engine.tell(Shutdown(drain_s))
    assert (engine.core.num_live == 0) == (drain_s == 0)
    engine.turn(7)
    assert {engine.finished[i].reason for i in ids} == {"unavailable"}


def test_a_resumed_request_tells_the_worker_what_penalties_count() -> None:
    engine = FakeEngine(64)
    submit = engine.submission([1, 2, 3], 12, presence_penalty=0.5, input_penalty=True)
    engine.tell(submit)
    engine.turn(5)
    engine.tell(PeerLost("worker", 0, "killed", 0))
    engine.start_workers(1)
    (admit,) = engine.plans[-2].admitted
    assert admit.counted_ids == [*submit.prompt_ids, *engine.tokens[submit.request_id]]
    assert admit.num_output_tokens == len(engine.tokens[submit.request_id])
    engine.finish()
    assert engine.tokens[submit.request_id] == engine.right_answer(submit)


def test_the_heartbeat_counts() -> None:
    engine = FakeEngine(64, page_size=4, running_max_req_size=1)
    engine.submit(list(range(9)), 4)
    engine.submit(list(range(9)), 4)
    engine.turn(2)
    beat = engine.core.heartbeat(step_us=12.5)
    assert (beat.num_running, beat.num_waiting, beat.num_paused) == (1, 1, 0)
    assert (beat.pages_total, beat.pages_free) == (64, 61)
    assert (beat.steps, beat.generated_tokens, beat.step_us) == (2, 2, 12.5)
    assert 11 <= beat.estimated_peak_tokens <= 16
    engine.finish()
    beat = engine.core.heartbeat()
    assert beat.generated_tokens == 8
    assert (beat.prefix_queries, beat.prefix_hits) == (18, 8)
    assert beat.pages_cached == 64 - beat.pages_free > 0
    assert beat.worker_ready


def test_the_same_messages_give_the_same_plans() -> None:
    plans = []
    for _ in range(2):
        engine = FakeEngine(30, page_size=2)
        engine.tell(*(engine.submission([i % 3, 1, 2], 12) for i in range(9)))
        engine.finish()
        plans.append(engine.plans)
    assert plans[0] == plans[1]
