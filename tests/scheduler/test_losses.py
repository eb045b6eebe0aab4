"""Processes die and return in any order; requests are replayed or end as they should."""

from fakes import FakeEngine
from glimmer.shared.messages import Hello, PeerLost


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


def test_a_smaller_group_ends_what_no_longer_fits_and_refuses_what_cannot() -> None:
    engine = FakeEngine(64, running_max_req_size=1)
    running = engine.submit([1] * 10, 100)
    queued = engine.submit([2] * 100, 5)
    engine.turn(40)
    engine.tell(PeerLost("worker", 0, "killed", 0))
    engine.start_workers(1, num_pages=10)
    assert engine.finished[running].reason == "length"
    assert engine.finished[queued].reason == "invalid"


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


def test_losses_reported_after_the_replacements_greeted_end_no_new_request() -> None:
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
