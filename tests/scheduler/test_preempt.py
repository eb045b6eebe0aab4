"""Pages are taken from those that lose least, and never from the oldest while others have any."""

import pytest
from fakes import FakeEngine
from glimmer.scheduler.admission import choose_victim
from glimmer.scheduler.request import Request, RequestState
from glimmer.shared.messages import Submit
from glimmer.shared.sampling import SamplingParams
from hypothesis import given
from hypothesis import strategies as st

STATES = (RequestState.PREFILL, RequestState.DECODE, RequestState.LAST)


@given(st.lists(st.tuples(st.integers(-1, 1), st.sampled_from(STATES)), min_size=1))
def test_the_victim_is_done_or_else_the_youngest_of_the_lowest_priority(
    entries: list[tuple[int, RequestState]],
) -> None:
    running = []
    for sequence, (priority, state) in enumerate(entries):
        request = Request(
            Submit(sequence, 0, [1], SamplingParams(1), priority=priority), sequence, 0, True
        )
        request.state = state
        running.append(request)
    running.sort(key=lambda r: r.age_key)
    victim = choose_victim(running)
    if any(r.state is RequestState.LAST for r in running):
        assert victim.state is RequestState.LAST
    else:
        assert victim.age_key == max(r.age_key for r in running)


@pytest.mark.parametrize("page_size", [1, 4])
def test_streams_do_not_change_when_requests_outgrow_the_memory(page_size: int) -> None:
    engine = FakeEngine(40 // page_size, page_size=page_size)
    submits = [engine.submission([i, i + 1, i + 2], 25, temperature=1.0) for i in range(6)]
    engine.tell(*submits)
    engine.finish()
    assert engine.core.heartbeat().preemptions > 0
    for submit in submits:
        assert engine.tokens[submit.request_id] == engine.right_answer(submit)
        assert engine.finished[submit.request_id].reason == "length"


def test_the_oldest_request_is_never_preempted() -> None:
    engine = FakeEngine(12, page_size=4)
    oldest = engine.submit([1, 2, 3], 36)
    for i in range(5):
        engine.submit([i, 9, 9], 36)
    steps_of_oldest = 0
    while oldest not in engine.finished:
        engine.turn()
        steps_of_oldest += 1
    assert engine.core.heartbeat().preemptions > 0
    assert steps_of_oldest <= 36 + 3, "the oldest had to wait"
    engine.finish()


def test_a_resumed_request_finds_its_own_pages_in_the_cache() -> None:
    engine = FakeEngine(14, page_size=2, running_max_req_size=2)
    engine.submit([1, 2, 3, 4], 20)
    second = engine.submit([5, 6, 7, 8], 20)
    engine.finish()
    assert engine.core.heartbeat().preemptions > 0
    resumed = [
        a for p in engine.plans for a in p.admitted if a.num_output_tokens and a.sampling.seed == 2
    ]
    assert resumed
    assert any(admit.num_cached_tokens > 0 for admit in resumed)
    assert engine.finished[second].num_cached_tokens == 0, "as of the first admission"


def test_a_row_whose_last_token_is_in_the_plan_being_made_is_not_taken() -> None:
    # Both reach a page boundary in the same step; the older one's token there is its last.
    engine = FakeEngine(7, page_size=4, running_max_req_size=2)
    engine.submit([1, 2, 3, 4], 8)
    engine.submit([5, 6, 7, 8], 16)
    engine.finish()  # FakeWorker refuses a plan that decodes a freed row
    assert len(engine.finished) == 2
