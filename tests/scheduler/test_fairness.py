"""Users with API keys get equal shares, none starves, and one alone is served as without keys."""

import tracemalloc
from collections import Counter
from itertools import count
from typing import Any

import pytest
from fakes import FakeEngine
from glimmer.scheduler.admission import WaitingQueue
from glimmer.scheduler.fairness import FairQueue
from glimmer.scheduler.request import Request, RequestState
from glimmer.shared.messages import Abort, Submit
from glimmer.shared.sampling import SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st

KEYS = {"api_key": ("0" * 64,)}


def engine(num_pages: int = 2000, **config: Any) -> FakeEngine:
    return FakeEngine(num_pages, **KEYS, **config)


def make(number: int, tenant: str, size: int = 1, priority: int = 0) -> Request:
    submit = Submit(number, 0, [1] * size, SamplingParams(1), priority=priority, tenant=tenant)
    return Request(submit, number, 0, uses_cache=True)


def start(queue: FairQueue | WaitingQueue, request: Request) -> None:
    """As the scheduler does."""
    queue.remove(request)
    request.move(RequestState.PREFILL)
    request.queue_ns = max(0, request.queue_ns)


def shares(fake: FakeEngine, tenants: dict[int, str]) -> Counter[str]:
    """Output tokens of each user so far."""
    result: Counter[str] = Counter()
    for request_id, tokens in fake.tokens.items():
        result[tenants[request_id]] += len(tokens)
    return result


@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(1, 9), st.sampled_from("sarp"))))
def test_one_user_alone_is_served_as_without_keys(steps: list[tuple[int, int, str]]) -> None:
    fair, plain = FairQueue(), WaitingQueue()
    running: list[tuple[Request, Request]] = []
    numbers = count(1)
    for priority, size, action in steps:
        if action == "s" and len(plain):
            pair = tuple(next(iter(queue.first(1))) for queue in (fair, plain))
            start(fair, pair[0])
            start(plain, pair[1])
            running.append((pair[0], pair[1]))
        elif action == "r" and len(plain):
            for queue in (fair, plain):
                queue.remove(list(queue.first(99))[-1])
        elif action == "p" and running:
            for queue, request in zip((fair, plain), running.pop(), strict=True):
                request.move(RequestState.PAUSED)
                queue.push(request)
        else:
            number = next(numbers)
            fair.push(make(number, "a", size, priority))
            plain.push(make(number, "", size, priority))
        assert [r.arrival for r in fair.first(64)] == [r.arrival for r in plain.first(64)]
        assert (len(fair), fair.num_tokens) == (len(plain), plain.num_tokens)
        fair.check_integrity()


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(1, 50), st.integers(-1, 1), st.integers(0, 3)
        ),
        max_size=80,
    )
)
def test_the_order_is_that_of_always_taking_the_user_with_the_fewest_tokens(
    steps: list[tuple[str, int, int, int]],
) -> None:
    queue, counts = FairQueue(), Counter[str]()
    floor = 0
    last = ""
    for number, (tenant, size, priority, starts) in enumerate(steps):
        present = {r.tenant for r in queue.check_integrity()}
        if tenant not in present:
            lowest = min((counts[t] for t in present), default=counts[last])
            floor = max(floor, lowest)
            counts[tenant] = max(counts[tenant], floor)
        queue.push(make(number, tenant, size, priority))
        for _ in range(min(starts, len(queue))):
            waiting = queue.check_integrity()
            expected = min(
                waiting, key=lambda r: (r.priority, counts[r.tenant], _eldest(r, waiting))
            )
            expected = min(
                (
                    r
                    for r in waiting
                    if (r.tenant, r.priority) == (expected.tenant, expected.priority)
                ),
                key=lambda r: r.arrival,
            )
            chosen = next(iter(queue.first(64)))
            assert chosen is expected
            start(queue, chosen)
            counts[chosen.tenant] += len(chosen.tokens)
            last = chosen.tenant


def _eldest(request: Request, waiting: list[Request]) -> int:
    """Arrival of the first request of the same user and priority."""
    own = [r for r in waiting if (r.tenant, r.priority) == (request.tenant, request.priority)]
    return min(r.arrival for r in own)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 30)), max_size=100))
def test_a_look_ahead_is_the_order_in_which_they_would_start(
    entries: list[tuple[str, int]],
) -> None:
    queue = FairQueue()
    for number, (tenant, size) in enumerate(entries):
        queue.push(make(number, tenant, size))
    ahead = list(queue.first(64))
    assert len(ahead) == min(64, len(entries))
    for request in ahead:
        assert next(iter(queue.first(1))) is request
        start(queue, request)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 10), (10, 1)])
def test_a_flood_of_one_user_does_not_delay_another(sizes: tuple[int, int]) -> None:
    """Both get as many tokens, however many and however large the requests are."""
    fake = engine(running_max_req_size=4)
    tenants = {}
    flood = [fake.submission([1] * 4, 4 * sizes[0], tenant="flood") for _ in range(200)]
    fake.tell(*flood)
    fake.turn(20)
    few = [fake.submission([2] * 4, 4 * sizes[1], tenant="few") for _ in range(40)]
    before = sum(map(len, fake.tokens.values()))
    fake.tell(*few)
    tenants |= {submit.request_id: "flood" for submit in flood}
    tenants |= {submit.request_id: "few" for submit in few}
    while not any(submit.request_id in fake.tokens for submit in few):
        fake.turn()
    at_first = shares(fake, tenants)
    while len(fake.finished.keys() & {submit.request_id for submit in few}) < 30:
        fake.turn()
    now = shares(fake, tenants) - at_first
    in_hand = 4 * (4 + 4 * max(sizes))  # rows that ran already
    assert abs(now["few"] - now["flood"]) <= 0.35 * now["few"] + in_hand, (now, before)


def test_a_user_who_was_away_has_no_claim_on_the_past() -> None:
    fake = engine(running_max_req_size=1)
    fake.tell(*(fake.submission([1], 5, tenant="a") for _ in range(50)))
    while len(fake.finished) < 25:
        fake.turn()
    late = [fake.submission([2], 5, tenant="b") for _ in range(20)]
    fake.tell(*late)
    fake.turn(60)
    done = [submit.request_id in fake.finished for submit in late]
    assert 4 <= sum(done) <= 7, "in turn, not all at once"


def test_newcomers_do_not_starve_a_large_request() -> None:
    fake = engine(running_max_req_size=1)
    fake.submit([9], 5, tenant="z")
    large = fake.submit([1] * 40, 4, tenant="large")
    for number in count():
        fake.submit([2], 2, tenant=f"new{number}")
        fake.turn()
        if large in fake.finished:
            break
        assert number < 60, "starved"


def test_nobody_starves_among_users_who_always_have_more() -> None:
    fake = engine(running_max_req_size=2)
    tenants: dict[int, str] = {}
    for turn in range(400):
        for name, size in (("a", 1), ("b", 3), ("c", 9)):
            waiting = [t for i, t in tenants.items() if i not in fake.finished]
            if waiting.count(name) < 3:
                tenants[fake.submit([turn % 60] * 3, 5 * size, tenant=name)] = name
        fake.turn()
    got = shares(fake, tenants)
    got.update(tenants[i] for i in fake.tokens for _ in range(3))  # prompts
    assert min(got.values()) > 0.75 * max(got.values()), got


def test_a_better_priority_still_comes_first() -> None:
    fake = engine(running_max_req_size=1)
    fake.submit([9], 3, tenant="a")
    ids = [
        fake.submit([1], 2, tenant="a", priority=1),
        fake.submit([1], 2, tenant="b", priority=1),
        fake.submit([1], 2, tenant="a", priority=0),
    ]
    fake.finish()
    assert [i for i in fake.finished if i in ids] == [ids[2], ids[1], ids[0]]


def test_requests_that_end_before_they_run_cost_nothing() -> None:
    fake = engine(running_max_req_size=1)
    fake.submit([9], 30, tenant="z")
    dropped = [fake.submission([1] * 50, 4, tenant="a") for _ in range(20)]
    fake.tell(*dropped)
    other = [fake.submit([2] * 50, 4, tenant="b") for _ in range(2)]
    fake.tell(Abort([submit.request_id for submit in dropped]))
    mine = [fake.submit([3] * 50, 4, tenant="a") for _ in range(2)]
    fake.finish()
    order = [i for i in fake.finished if i in (*other, *mine)]
    assert order == [other[0], mine[0], other[1], mine[1]]


def test_a_preempted_request_comes_back_before_others_start() -> None:
    fake = engine(12, running_max_req_size=8, disable_dynamic_prompt_cache=True)
    ids = [fake.submit([n] * 8, 20, tenant="ab"[n % 2]) for n in range(8)]
    fake.finish()
    assert fake.core.heartbeat().preemptions > 0
    assert all(fake.finished[i].reason == "length" for i in ids)


@pytest.mark.parametrize("limits", [{"max_queued_requests": 50}, {"max_queued_tokens": 500}])
def test_one_user_never_fills_the_whole_queue(limits: dict[str, int]) -> None:
    fake = engine(running_max_req_size=1, **limits)
    fake.submit([9], 1000, tenant="z")
    flood = [fake.submission([1] * 10, 4, tenant="flood") for _ in range(200)]
    fake.tell(*flood)
    refused = [fake.finished[s.request_id] for s in flood if s.request_id in fake.finished]
    assert len(refused) == 160
    assert {f.reason for f in refused} == {"overloaded"}
    assert all("of this key are waiting" in f.message for f in refused)
    others = [fake.submit([2] * 10, 4, tenant=f"u{n}") for n in range(5)]
    assert not fake.finished.keys() & set(others)
    fake.finish()
    assert all(fake.finished[i].reason == "length" for i in others)


def test_without_keys_one_client_may_fill_it() -> None:
    fake = FakeEngine(200, running_max_req_size=1, max_queued_requests=50)
    fake.tell(*(fake.submission([1], 50) for _ in range(60)))
    assert len(fake.finished) == 10, "50 wait"


def test_counts_of_users_who_left_are_forgotten() -> None:
    """Memory does not grow with the number of names that were ever used."""
    queue, sizes = FairQueue(), []
    tracemalloc.start()
    for number in range(6000):
        if number % 3000 == 2999:
            sizes.append(tracemalloc.get_traced_memory()[0])
        queue.push(make(number, f"u{number}", 3))
        for request in list(queue.first(2))[: number % 2 + 1]:
            start(queue, request)
            request.move(RequestState.PAUSED)
            request.move(RequestState.FINISHED)
    tracemalloc.stop()
    assert len(queue) <= 2
    assert sizes[1] - sizes[0] < 50_000, "bytes, for 3,000 names"
