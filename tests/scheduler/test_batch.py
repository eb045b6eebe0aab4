"""What one plan holds: decode rows first, prompts in chunks, never more than the budget."""

from fakes import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st


def num_tokens(plan: object) -> int:
    return len(plan.decode) + sum(len(c.token_ids) for c in plan.prefill)  # type: ignore[attr-defined]


@settings(max_examples=25)
@given(
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    budget=st.integers(1, 40),
    chunk=st.integers(1, 40),
    rows=st.integers(1, 10),
)
def test_budget_chunk_size_and_rows_hold_for_any_load(
    prompts: list[int], budget: int, chunk: int, rows: int
) -> None:
    engine = FakeEngine(
        400, batch_max_tokens=budget, chunked_prefill_size=chunk, running_max_req_size=rows
    )
    submits = [engine.submission([i] * length, 5) for i, length in enumerate(prompts)]
    engine.tell(*submits)
    engine.finish()  # FakeWorker checks budget, chunk size and rows of every plan
    for submit in submits:
        assert engine.tokens[submit.request_id] == engine.right_answer(submit)


def test_several_short_prompts_share_a_step() -> None:
    engine = FakeEngine(64, batch_max_tokens=20)
    engine.tell(*(engine.submission([i] * 5) for i in range(6)))
    assert [len(c.token_ids) for c in engine.plans[0].prefill] == [5, 5, 5, 5]
    assert [c.sample for c in engine.plans[0].prefill] == [True] * 4


def test_decode_never_waits_for_a_long_prompt() -> None:
    engine = FakeEngine(200, batch_max_tokens=16, chunked_prefill_size=8)
    engine.submit([1, 2], 60)
    engine.turn(4)
    engine.submit([7] * 300, 2)
    seen = len(engine.plans)
    engine.turn(20)
    later = engine.plans[seen:]
    assert all(len(plan.decode) == 1 for plan in later)
    assert all(len(plan.prefill[0].token_ids) == 8 for plan in later[:-2])


def test_a_prompt_decodes_in_the_plan_after_its_last_chunk() -> None:
    engine = FakeEngine(64, chunked_prefill_size=4)
    engine.submit(list(range(10)), 3)
    engine.finish()
    kinds = [(len(p.prefill), len(p.decode)) for p in engine.plans]
    assert kinds == [(1, 0)] * 3 + [(0, 1)] * 2
    chunks = [p.prefill[0] for p in engine.plans[:3]]
    assert [c.sample for c in chunks] == [False, False, True]
    assert [c.next_id for c in chunks] == [4, 8, -1]
    assert [c.start for c in chunks] == [0, 4, 8]


def test_without_chunking_a_prompt_runs_in_one_step_or_waits() -> None:
    engine = FakeEngine(
        200, batch_max_tokens=50, disable_chunked_prefill=True, max_req_total_len=50
    )
    engine.submit([1] * 30, 15)
    engine.turn(3)
    engine.submit([2] * 45, 3)
    engine.submit([3] * 49, 3)  # fits only when nothing decodes
    engine.finish()
    chunks = [c for p in engine.plans for c in p.prefill]
    assert [len(c.token_ids) for c in chunks] == [30, 45, 49]
    assert all(c.sample for c in chunks)
    assert len(engine.finished) == 3


def test_more_decode_rows_than_budget_take_turns_by_age() -> None:
    engine = FakeEngine(200, batch_max_tokens=2)
    submits = [engine.submission([i], 6) for i in range(5)]
    engine.tell(*submits)
    engine.finish()
    for submit in submits:
        assert engine.tokens[submit.request_id] == engine.right_answer(submit)


def test_drafts_get_pages_for_the_case_that_all_are_accepted() -> None:
    engine = FakeEngine(64, mtp_step=3, mtp_fixed_step=True)
    engine.submit([1, 2, 3, 4], 40)
    assert [plan.num_drafts for plan in engine.plans] == [3, 3]
    # 4 tokens have KV, and 4 more may in the next step: positions 4 to 7, one page of 4
    assert [len(plan.appended) for plan in engine.plans] == [0, 1]
    engine.finish()
    assert sum(len(part.pages) for plan in engine.plans for part in plan.appended) == 10


def test_drafts_take_no_pages_from_others() -> None:
    engine = FakeEngine(6, page_size=4, max_req_total_len=21, mtp_step=7, mtp_fixed_step=True)
    submits = [engine.submission([n], 11) for n in range(2)]  # 3 pages each, all there are
    engine.tell(*submits)
    engine.finish()
    assert engine.core.heartbeat().preemptions == 0
    for submit in submits:
        assert engine.tokens[submit.request_id] == engine.right_answer(submit)


def test_a_request_has_no_page_beyond_its_longest_length() -> None:
    engine = FakeEngine(20, page_size=1, max_req_total_len=16, mtp_step=7, mtp_fixed_step=True)
    submit = engine.submission([1, 2, 3], 100)
    engine.tell(submit)
    engine.finish()  # FakeWorker checks the size of the page table
    assert engine.tokens[submit.request_id] == engine.right_answer(submit)
    assert engine.finished[submit.request_id].reason == "length"
