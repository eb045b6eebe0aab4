"""Rows wait for their grammars, other rows do not, and no grammar is kept for ever."""

from collections import Counter
from typing import Any

from fakes import FakeEngine, grammar
from glimmer.scheduler.grammars import MAX_IDLE
from glimmer.shared.messages import Abort, GrammarLoaded, LoadGrammar, PeerLost, WorkerFailed


def asked(engine: FakeEngine) -> list[LoadGrammar]:
    return [o.message for o in engine.sent if isinstance(o.message, LoadGrammar)]


def holding(**config: Any) -> FakeEngine:
    """Grammars are loaded when the test says so."""
    engine = FakeEngine(64, **config)
    engine.holds_grammars = True
    return engine


def load(engine: FakeEngine, message: LoadGrammar) -> None:
    engine.tell(*engine.worker.load_grammar(message))


def test_a_row_waits_for_its_grammar_and_others_do_not() -> None:
    engine = holding()
    waiting = engine.submission([1, 2, 3], 4, grammar=grammar())
    engine.tell(waiting)
    free = engine.submit([4, 5], 4)
    engine.turn(8)
    assert engine.finished[free].reason == "length"
    assert waiting.request_id not in engine.tokens
    assert [m.grammar for m in asked(engine)] == [waiting.grammar]
    load(engine, asked(engine)[0])
    engine.finish()
    assert engine.tokens[waiting.request_id] == engine.right_answer(waiting)
    admitted = [a for plan in engine.plans for a in plan.admitted if a.grammar is not None]
    assert [a.matched_ids for a in admitted] == [[]]


def test_equal_grammars_are_loaded_once_and_kept_for_the_next() -> None:
    engine = FakeEngine(64)
    for _ in range(3):
        engine.submit([1, 2], 2, grammar=grammar("a"))
    engine.finish()
    engine.submit([1, 2], 2, grammar=grammar("a"))
    engine.finish()
    assert len(asked(engine)) == 1


def test_idle_grammars_are_dropped_oldest_first() -> None:
    engine = FakeEngine(64)
    for number in range(MAX_IDLE + 3):
        engine.submit([1, 2], 1, grammar=grammar(f"g{number}"))
        engine.finish()
    dropped = [name for message in asked(engine) for name in message.dropped]
    assert dropped == ["g0", "g1", "g2"]
    assert len(engine.worker.grammars) == MAX_IDLE
    engine.submit([1, 2], 1, grammar=grammar("g0"))  # and is loaded anew
    engine.finish()
    loads = Counter(m.grammar.name for m in asked(engine) if m.grammar)
    assert (loads["g0"], loads["g5"]) == (2, 1)


def test_a_preempted_row_resumes_with_what_its_grammar_has_seen() -> None:
    engine = FakeEngine(11, max_req_total_len=32)
    submits = [engine.submission([n, 9, 9, 9], 24, grammar=grammar()) for n in range(3)]
    engine.tell(*submits)
    engine.finish()
    assert engine.core.heartbeat().preemptions
    resumed = [a for p in engine.plans for a in p.admitted if a.num_output_tokens]
    assert resumed
    assert all(len(a.matched_ids) == a.num_output_tokens for a in resumed)
    for submit in submits:
        assert engine.tokens[submit.request_id] == engine.right_answer(submit)


def test_new_workers_are_asked_again_for_what_live_requests_need() -> None:
    engine = FakeEngine(64)
    done = engine.submit([1], 1, grammar=grammar("old"))
    engine.finish()
    assert done in engine.finished
    submit = engine.submission([1, 2], 8, grammar=grammar("new"))
    engine.tell(submit)
    engine.turn(3)
    engine.tell(PeerLost("worker", 0, "killed", 0))
    engine.start_workers(1)
    engine.finish()
    assert engine.tokens[submit.request_id] == engine.right_answer(submit)
    last = [m for m in asked(engine) if m.epoch == 1]
    assert [m.grammar.name for m in last if m.grammar] == ["new"]


def test_one_that_cannot_be_loaded_fails_its_requests_alone() -> None:
    engine = holding()
    bad = [engine.submit([1], 4, grammar=grammar("bad")) for _ in range(2)]
    good = engine.submit([1], 4, grammar=grammar("good"))
    engine.tell(GrammarLoaded(0, "bad", "no such file"))
    assert {engine.finished[i].reason for i in bad} == {"error"}
    assert "no such file" in engine.finished[bad[0]].message
    load(engine, asked(engine)[-1])
    engine.finish()
    assert engine.finished[good].reason == "length"


def test_aborts_while_loading_leave_nothing() -> None:
    engine = holding()
    request = engine.submit([1], 4, grammar=grammar())
    engine.tell(Abort([request]))
    assert engine.finished[request].reason == "abort"
    again = engine.submit([1], 4, grammar=grammar())
    assert len(asked(engine)) == 1  # still on its way
    load(engine, asked(engine)[0])
    engine.finish()
    assert engine.finished[again].reason == "length"


def test_answers_without_a_question_are_ignored() -> None:
    engine = holding()
    engine.submit([1], 4, grammar=grammar())
    engine.tell(GrammarLoaded(7, "g"), GrammarLoaded(0, "other"), GrammarLoaded(0, "other", "x"))
    assert not engine.plans
    load(engine, asked(engine)[0])
    engine.tell(GrammarLoaded(0, "g", "late"))
    engine.finish()
    assert {f.reason for f in engine.finished.values()} == {"length"}


def failures(engine: FakeEngine) -> list[str]:
    return [o.message.reason for o in engine.sent if isinstance(o.message, WorkerFailed)]


def test_workers_that_never_load_a_grammar_are_replaced() -> None:
    engine = holding(step_timeout_s=5.0)
    engine.now_ns += 100_000_000_000  # idle for long: no reproach
    engine.submit([1], 4, grammar=grammar("slow"))
    engine.submit([1], 4, grammar=grammar("next"))
    engine.now_ns += 4_900_000_000
    load(engine, asked(engine)[0])
    engine.now_ns += 4_900_000_000  # each grammar has its own time
    engine.turn(8)
    assert failures(engine) == []
    engine.now_ns += 200_000_000
    engine.tell()
    engine.tell()
    assert failures(engine) == ["loading a grammar took longer than 5 s"]


def test_a_grammar_that_ends_its_workers_twice_is_given_up() -> None:
    engine = holding()
    bad = engine.submit([1], 4, grammar=grammar("bad"))
    good = engine.submit([1], 4, grammar=grammar("good"))
    for epoch in (0, 1):
        assert bad not in engine.finished
        engine.tell(PeerLost("worker", 0, "killed", epoch))
        engine.start_workers(epoch + 1)
    assert engine.finished[bad].reason == "unavailable"
    load(engine, asked(engine)[-1])
    engine.finish()
    assert engine.finished[good].reason == "length"
