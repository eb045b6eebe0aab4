"""A result reaches the right requests, once."""

from typing import Any

from fakes import FakeEngine
from glimmer.scheduler.batch import SentStep, fits
from glimmer.shared.messages import (
    PrefillChunk,
    RowResult,
    StepPlan,
    StepResult,
    TokenLogprob,
    TokenRow,
    Tokens,
)


def rows_for(engine: FakeEngine, request_id: int) -> list[TokenRow]:
    return [
        row
        for outgoing in engine.sent
        if isinstance(outgoing.message, Tokens)
        for row in outgoing.message.rows
        if row.request_id == request_id
    ]


def sent_step(num_chunks: int, num_decodes: int, num_drafts: int = 0) -> SentStep:
    """Step 5. All of its chunks sample."""
    requests: list[Any] = [object()] * (num_chunks + num_decodes)
    chunks = [PrefillChunk(row, 0, [1], True) for row in range(num_chunks)]
    decode = list(range(num_chunks, len(requests)))
    plan = StepPlan(0, 5, [], [], [], chunks, decode, num_drafts)
    return SentStep(plan, requests[:num_chunks], requests)


def test_only_a_result_of_the_plans_shape_fits() -> None:
    step = sent_step(1, 1)
    two = [RowResult([1]), RowResult([2])]
    assert fits(step, StepResult(0, 5, two))
    assert fits(step, StepResult(0, 5, two, [[]]))
    assert not fits(step, StepResult(0, 6, two))
    assert not fits(step, StepResult(0, 5, two[:1]))
    assert not fits(step, StepResult(0, 5, two, [[], []]))
    assert not fits(step, StepResult(0, 5, [RowResult([1]), RowResult([])]))
    assert not fits(step, StepResult(0, 5, [RowResult([1]), RowResult([2, 3])]))
    drafting = sent_step(1, 1, num_drafts=2)
    assert fits(drafting, StepResult(0, 5, [RowResult([1]), RowResult([2, 3, 4])]))
    assert not fits(drafting, StepResult(0, 5, [RowResult([1, 2]), RowResult([3])]))
    assert not fits(drafting, StepResult(0, 5, [RowResult([1]), RowResult([2, 3, 4, 5])]))
    assert fits(drafting, StepResult(0, 5, [], error="no memory"))
    assert not fits(drafting, StepResult(0, 6, [], error="no memory"))
    assert fits(SentStep(step.plan, [], [], is_void=True), StepResult(0, 5, two))
    entry = TokenLogprob(2, -1.0, 1, [])
    assert not fits(drafting, StepResult(0, 5, [RowResult([1]), RowResult([2, 3], [entry])]))


def test_tokens_of_one_step_travel_in_one_message_per_frontend() -> None:
    engine = FakeEngine(64, httpserver_workers=2)
    ids = {f: [engine.submission([f, i], frontend=f) for i in range(3)] for f in (0, 1)}
    engine.tell(*ids[0], *ids[1])
    engine.turn()
    messages = [o for o in engine.sent if isinstance(o.message, Tokens)]
    assert [o.index for o in messages] == [0, 1]
    for outgoing in messages:
        assert isinstance(outgoing.message, Tokens)
        expected = [s.request_id for s in ids[outgoing.index]]
        assert [row.request_id for row in outgoing.message.rows] == expected


def test_the_extra_token_after_a_stop_is_dropped() -> None:
    engine = FakeEngine(64)
    submit = engine.submission([1, 2, 3], 50, stop_token_ids=tuple(range(0, 64, 4)))
    engine.tell(submit)
    engine.finish()
    right = engine.right_answer(submit)
    assert len(right) < 50
    assert engine.tokens[submit.request_id] == right
    sampled = sum(len(p.decode) + sum(c.sample for c in p.prefill) for p in engine.plans)
    assert sampled == len(right) + 1, "look-ahead costs exactly one extra token"


def test_tokens_after_a_stop_token_or_the_limit_are_dropped() -> None:
    for seed in range(20):
        engine = FakeEngine(64, mtp_step=7, mtp_fixed_step=True, batch_max_tokens=200)
        submits = [
            engine.submission([seed, 1], 50, stop_token_ids=tuple(range(0, 64, 8)), num_logprobs=0),
            engine.submission([seed, 2], 9),
        ]
        engine.tell(*submits)
        engine.finish()
        for submit in submits:
            rows = rows_for(engine, submit.request_id)
            assert engine.tokens[submit.request_id] == engine.right_answer(submit)
            accepted = sum(len(row.token_ids) - 1 for row in rows)
            assert engine.finished[submit.request_id].mtp_accepted_tokens == accepted
        for row in rows_for(engine, submits[0].request_id):
            assert [entry.token_id for entry in row.logprobs] == row.token_ids


def test_a_finish_by_length_wastes_no_step() -> None:
    engine = FakeEngine(64)
    engine.submit([1, 2, 3], 7)
    engine.finish()
    assert sum(len(p.decode) + len(p.prefill) for p in engine.plans) == 7


def test_logprobs_travel_with_their_tokens() -> None:
    engine = FakeEngine(64)
    request_id = engine.submit([1, 2, 3], 5, num_logprobs=0)
    engine.finish()
    for row in rows_for(engine, request_id):
        assert [entry.token_id for entry in row.logprobs] == row.token_ids


def test_prompt_logprobs_come_once_and_in_order_also_through_preemption() -> None:
    engine = FakeEngine(12, page_size=4, batch_max_tokens=6, chunked_prefill_size=5)
    prompts = [[i, *range(10, 20)] for i in range(4)]
    ids = [engine.submit(prompt, 25, num_prompt_logprobs=0) for prompt in prompts]
    engine.finish()
    assert engine.core.heartbeat().preemptions > 0
    for request_id, prompt in zip(ids, prompts, strict=True):
        entries = [e for row in rows_for(engine, request_id) for e in row.prompt_logprobs]
        assert [e.token_id for e in entries] == prompt[1:]
        assert [-e.logprob for e in entries] == list(range(1, len(prompt)))
