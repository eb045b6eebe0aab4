"""Which requests are refused and why, which may start, and that none waits for ever."""

import pytest
from fakes import FakeEngine
from glimmer.scheduler.admission import Admission
from glimmer.scheduler.batch import StepLimits
from glimmer.scheduler.request import Request
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ConfigError
from glimmer.shared.messages import Finished, Shutdown, Submit
from glimmer.shared.sampling import SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st


def refusal(engine: FakeEngine, prompt: list[int], max_new: int = 4, **values: object) -> Finished:
    request_id = engine.submit(prompt, max_new, **values)  # type: ignore[arg-type]
    return engine.finished[request_id]


@pytest.mark.parametrize(
    ("prompt", "max_new", "field"),
    [([], 4, "inputs"), ([1], 0, "max_new_tokens"), ([1] * 100, 4, "inputs")],
)
def test_what_can_never_run_is_invalid_at_once(prompt: list[int], max_new: int, field: str) -> None:
    engine = FakeEngine(64, max_req_total_len=100)
    finished = refusal(engine, prompt, max_new)
    assert (finished.reason, finished.field) == ("invalid", field)
    assert finished.message


@pytest.mark.parametrize("token", [1 << 31, 1 << 62, -(1 << 40)])
def test_an_absurd_token_id_is_invalid(token: int) -> None:
    finished = refusal(FakeEngine(64), [1, token])
    assert (finished.reason, finished.field) == ("invalid", "inputs")


@pytest.mark.parametrize(
    ("num_pages", "config", "limit"),
    [
        (100, {"max_req_total_len": 50}, 50),
        (10, {"max_req_total_len": 50}, 36),  # capacity - page_size
        (10, {"max_req_total_len": None}, 36),
        (100, {"max_req_total_len": 90, "disable_chunked_prefill": True}, 64),  # batch_max_tokens
    ],
)
def test_the_limit_is_the_smallest_of_what_is_wished_and_what_fits(
    num_pages: int, config: dict[str, object], limit: int
) -> None:
    engine = FakeEngine(num_pages, **config)
    assert refusal(engine, [1] * limit).reason == "invalid"
    longest = engine.submit([1] * (limit - 1), 100)
    some = engine.submit([2] * (limit // 2), 100_000)
    engine.finish()
    assert len(engine.tokens[longest]) == 1
    assert len(engine.tokens[some]) == limit - limit // 2
    assert engine.finished[some].reason == "length"


def test_a_full_queue_refuses_with_the_time_to_come_back() -> None:
    engine = FakeEngine(64, max_queued_requests=3, running_max_req_size=1)
    engine.tell(*(engine.submission([1, 2], 50) for _ in range(6)))
    refused = list(engine.finished.values())
    assert [f.reason for f in refused] == ["overloaded"] * 3
    assert all(f.retry_after_s >= 1 for f in refused)


def test_queued_tokens_are_limited_but_one_long_prompt_may_always_wait() -> None:
    engine = FakeEngine(200, max_queued_tokens=50, running_max_req_size=1)
    engine.submit([1], 50)
    assert engine.submit([2] * 60, 2) not in engine.finished
    assert refusal(engine, [3] * 5).reason == "overloaded"


@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_a_wait_ends_after_the_requests_own_or_the_servers_time(seconds: float) -> None:
    own = {"timeout_s": 0.5} if seconds == 0.5 else {}
    engine = FakeEngine(128, running_max_req_size=1, queue_timeout_s=3.0)
    engine.submit([1], 10_000)
    waiting = engine.submit([2], 5, **own)
    start = engine.now_ns
    while waiting not in engine.finished:
        engine.turn()
    assert engine.finished[waiting].reason == "overloaded"
    assert (engine.now_ns - start) / 1e9 == pytest.approx(seconds, abs=0.02)


def test_a_request_that_runs_is_not_ended_by_the_queue_timeout() -> None:
    engine = FakeEngine(64, queue_timeout_s=0.05)
    request_id = engine.submit([1], 50)
    engine.finish()
    assert engine.finished[request_id].reason == "length"
    assert engine.finished[request_id].queue_s < 0.05


def test_while_draining_new_requests_are_refused_and_running_ones_finish() -> None:
    engine = FakeEngine(64)
    request_id = engine.submit([1], 5)
    engine.tell(Shutdown(60.0))
    finished = refusal(engine, [2])
    assert finished.reason == "overloaded"
    assert "shutting down" in finished.message
    engine.finish()
    assert engine.finished[request_id].reason == "length"


def test_huge_max_new_tokens_do_not_collapse_concurrency() -> None:
    engine = FakeEngine(100, page_size=4, running_max_req_size=64)
    stops = tuple(range(0, 64, 4))  # outputs are about 4 tokens long
    most = 0
    engine.tell(*(engine.submission([i, 1], 100_000, stop_token_ids=stops) for i in range(60)))
    while engine.core.num_live:
        engine.turn()
        most = max(most, engine.core.heartbeat().num_running)
    assert most >= 12, f"at most {most} ran at once"


def test_a_big_request_is_overtaken_but_not_for_ever() -> None:
    engine = FakeEngine(20, page_size=4, running_max_req_size=4, disable_dynamic_prompt_cache=True)
    engine.submit([1] * 20, 30)
    big = engine.submit([2] * 70, 2)
    overtakers = 0
    while big not in engine.tokens:
        if len(engine.finished) + 3 > overtakers:  # there is always a small request
            engine.submit([3], 2)
            overtakers += 1
        engine.turn()
        assert engine.now_ns < 60e9, "the big request starves"
    assert overtakers > 3, "the pages that the big one cannot use stay unused"


def test_a_better_priority_starts_first_and_equals_in_order() -> None:
    engine = FakeEngine(64, running_max_req_size=1)
    engine.submit([9], 3)
    ids = [engine.submit([i], 2, priority=p) for i, p in enumerate([1, 0, 1, 0, -1])]
    engine.finish()
    order = [i for i in engine.finished if i in ids]
    assert order == [ids[4], ids[1], ids[3], ids[0], ids[2]]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=10))
def test_the_expected_length_follows_what_finishes(lengths: list[int]) -> None:
    admission = Admission(ServeConfig(max_req_total_len=100_000))
    for length in lengths * (200 // len(lengths)):
        admission.observe_output(length)
    request = Request(Submit(1, 0, [1], SamplingParams(100_000)), 1, 0, uses_cache=True)
    assert admission.fit_length(request) is None
    assert min(64, *lengths) <= admission.expected_growth(request) <= max(64, *lengths)


def test_retry_after_follows_the_drain_rate() -> None:
    waits = []
    for interval_s in (0.01, 2.0):
        admission = Admission(ServeConfig(max_req_total_len=1000, max_queued_requests=10))
        for start in range(300):
            admission.observe_start(int(start * interval_s * 1e9), num_waiting=5)
        ending = admission.timed_out(num_waiting=10)
        waits.append(ending.retry_after_s)
    assert waits == [1.0, 20.0]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"running_max_req_size": 1},
        {"running_max_req_size": 1, "batch_max_tokens": 0},
        {"running_max_req_size": 1, "batch_max_tokens": 4, "page_size": 0},
    ],
)
def test_unsettled_limits_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        StepLimits.of(ServeConfig(**values))
