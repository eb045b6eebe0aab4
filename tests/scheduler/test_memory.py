"""Which pages a request gets, which it leaves in the prefix cache, and which others find there."""

import pytest
from fakes import FakeEngine
from glimmer.shared.messages import Abort, FlushCache
from hypothesis import given, settings
from hypothesis import strategies as st


def cached(engine: FakeEngine, request_id: int) -> int:
    return engine.finished[request_id].num_cached_tokens


def ask(engine: FakeEngine, prompt: list[int], **values: object) -> int:
    """Run a request to its end. Returns its prompt tokens that were in the cache."""
    request_id = engine.submit(prompt, 2, **values)  # type: ignore[arg-type]
    engine.finish()
    return cached(engine, request_id)


@pytest.mark.parametrize(("length", "hit"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (17, 16)])
def test_a_repeated_prompt_is_found_up_to_its_last_token(length: int, hit: int) -> None:
    engine = FakeEngine(64, page_size=4)
    prompt = list(range(length))
    assert ask(engine, prompt) == 0
    assert ask(engine, prompt) == hit


def test_the_next_turn_of_a_conversation_finds_prompt_and_answer() -> None:
    engine = FakeEngine(64, page_size=1)
    submit = engine.submission([1, 2, 3], 6)
    engine.tell(submit)
    engine.finish()
    turn = [*submit.prompt_ids, *engine.tokens[submit.request_id]]
    assert ask(engine, [*turn, 9]) == len(turn) - 1, "the last token's KV was never written"


@pytest.mark.parametrize(
    "values", [{"use_prefix_cache": False}, {"num_prompt_logprobs": 0}, {"cache_salt": "other"}]
)
def test_nothing_is_reused_when_it_must_not_be(values: dict[str, object]) -> None:
    engine = FakeEngine(64, page_size=4)
    prompt = list(range(20))
    assert ask(engine, prompt) == 0
    assert ask(engine, prompt, **values) == 0


def test_the_cache_can_be_turned_off() -> None:
    engine = FakeEngine(64, page_size=4, disable_dynamic_prompt_cache=True)
    assert ask(engine, list(range(20))) == 0
    assert ask(engine, list(range(20))) == 0
    assert engine.core.heartbeat().pages_free == 64


def test_samples_of_one_prompt_compute_it_once() -> None:
    engine = FakeEngine(200, page_size=4, chunked_prefill_size=8, batch_max_tokens=64)
    prompt = list(range(41))
    submits = [engine.submission(prompt, 5, temperature=1.0) for _ in range(4)]
    engine.tell(*submits)
    engine.finish()
    assert sorted(cached(engine, s.request_id) for s in submits) == [0, 40, 40, 40]
    computed = sum(len(c.token_ids) for p in engine.plans for c in p.prefill)
    assert computed == 41 + 3


@pytest.mark.parametrize("kind", ["abort", "preempt"])
def test_those_that_wait_for_a_prefix_go_on_when_it_never_comes(kind: str) -> None:
    engine = FakeEngine(40, page_size=4, chunked_prefill_size=4, batch_max_tokens=16)
    prompt = list(range(60))
    first = engine.submit(prompt, 2, priority=1)
    second = engine.submit(prompt, 2, priority=1)
    assert engine.core.heartbeat().num_waiting == 1
    if kind == "abort":
        engine.tell(Abort([first]))
    else:
        for i in range(6):
            engine.submit([50 + i] * 3, 30)
    engine.finish()
    assert engine.finished[second].reason == "length"


def test_pages_computed_in_a_step_are_not_read_in_the_same_step() -> None:
    engine = FakeEngine(64, page_size=4, batch_max_tokens=64, chunked_prefill_size=64)
    prompt = list(range(30))
    engine.tell(engine.submission(prompt, 2), engine.submission(prompt, 2))
    assert len(engine.plans[0].prefill) == 1
    assert engine.plans[1].admitted[0].num_cached_tokens == 28
    engine.finish()


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 24)), min_size=1, max_size=15),
    st.sampled_from([1, 2, 4]),
)
def test_any_mix_of_shared_prompts_is_served_exactly_in_little_memory(
    requests: list[tuple[int, int]], page_size: int
) -> None:
    engine = FakeEngine(48 // page_size, page_size=page_size)
    bases = [[base * 7 + i % 5 for i in range(24)] for base in range(3)]
    submits = [engine.submission(bases[base][:length], 8) for base, length in requests]
    for submit in submits:
        engine.tell(submit)
        engine.turn()
    engine.finish()
    for submit in submits:
        assert engine.tokens[submit.request_id] == engine.right_answer(submit)
    beat = engine.core.heartbeat()
    assert beat.pages_free + beat.pages_cached == beat.pages_total


def test_a_flushed_cache_keeps_what_running_requests_use() -> None:
    engine = FakeEngine(64)
    first = engine.submission([1] * 12, 4)
    engine.tell(first)
    engine.finish()
    running = engine.submission([2] * 12, 40)
    engine.tell(running)
    engine.turn(3)
    assert engine.core.heartbeat().pages_cached > 0
    engine.tell(FlushCache())
    beat = engine.core.heartbeat()
    assert (beat.pages_cached, beat.num_running) == (0, 1)
    engine.core.check_integrity()
    engine.finish()
    assert engine.tokens[running.request_id] == engine.right_answer(running)
