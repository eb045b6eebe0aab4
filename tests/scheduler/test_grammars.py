"""Rows with grammars: what they resume with, and a grammar that becomes too complex."""

import pytest
from fakes import GRAMMAR_ERROR, FakeEngine, grammar
from glimmer.shared.messages import RowResult, StepResult, WorkerFailed


def test_a_preempted_row_resumes_with_what_its_grammar_has_seen() -> None:
    engine = FakeEngine(11, max_req_total_len=32)
    submits = [engine.submission([n, 9, 9, 9], 24, grammar=grammar()) for n in range(3)]
    engine.tell(*submits)
    engine.finish()
    assert engine.core.heartbeat().preemptions
    resumed = [a for p in engine.plans for a in p.admitted if a.num_output_tokens]
    assert resumed
    assert all(len(a.output_ids) == a.num_output_tokens for a in resumed)
    for submit in submits:
        assert engine.tokens[submit.request_id] == engine.right_answer(submit)


@pytest.mark.parametrize("mtp_step", [0, 3])
@pytest.mark.parametrize("fails_at", [0, 1, 9])
def test_a_grammar_that_fails_ends_its_request_alone(fails_at: int, mtp_step: int) -> None:
    """Beside it a row with the same prompt, one that is still in its prompt, and a queued one."""
    engine = FakeEngine(64, running_max_req_size=3, chunked_prefill_size=4, mtp_step=mtp_step)
    bad = engine.submission([1, 2, 3], 40, grammar=grammar(fails_at))
    others = [
        engine.submission([1, 2, 3], 20, grammar=grammar()),
        engine.submission(list(range(30)), 20),
        engine.submission([7], 20),
    ]
    engine.tell(bad, *others)
    engine.finish()
    ended = engine.finished[bad.request_id]
    assert (ended.reason, ended.field) == ("invalid", "guided_json")
    assert ended.message == GRAMMAR_ERROR
    received = engine.tokens.get(bad.request_id, [])
    right = engine.right_answer(bad)
    assert received == right[: len(received)]
    assert len(right) - mtp_step <= len(received) == ended.num_output_tokens
    for submit in others:
        assert engine.tokens[submit.request_id] == engine.right_answer(submit)
    beat = engine.core.heartbeat()
    assert beat.pages_free + beat.pages_cached == beat.pages_total


def test_a_row_without_a_grammar_cannot_have_such_an_error() -> None:
    engine = FakeEngine(64)
    engine.submit([1], 4)
    engine.tell(StepResult(0, 0, [RowResult([], error="x")]))
    failed = [o.message for o in engine.sent if isinstance(o.message, WorkerFailed)]
    assert "does not fit" in failed[0].reason
