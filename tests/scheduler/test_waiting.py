"""The queue keeps its order and loses no request."""

from glimmer.scheduler.admission import WaitingQueue
from glimmer.scheduler.request import Request, RequestState
from glimmer.shared.messages import Submit
from glimmer.shared.sampling import SamplingParams
from hypothesis import given
from hypothesis import strategies as st


def make(sequence: int, priority: int = 0, deadline_ns: int = 0, ran: bool = False) -> Request:
    submit = Submit(sequence, 0, [1, 2, 3], SamplingParams(1), priority=priority)
    request = Request(submit, sequence, 0, uses_cache=True)
    request.deadline_ns = deadline_ns
    if ran:
        request.move(RequestState.PREFILL)
        request.move(RequestState.PAUSED)
    return request


@given(st.lists(st.tuples(st.integers(-1, 1), st.booleans(), st.booleans())))
def test_order_is_priority_then_those_that_ran_then_arrival(
    entries: list[tuple[int, bool, bool]],
) -> None:
    queue = WaitingQueue()
    expected = []
    for sequence, (priority, ran, leave) in enumerate(entries):
        request = make(sequence, priority, ran=ran)
        queue.push(request)
        if leave:
            queue.remove(request)
        else:
            expected.append((priority, not ran, sequence))
    order = [(r.priority, r.state is RequestState.WAITING, r.arrival) for r in queue.first(99)]
    assert order == sorted(expected)
    assert len(queue) == len(expected)
    assert queue.num_tokens == 3 * len(expected)
    queue.check_integrity()


@given(st.lists(st.integers(0, 20), max_size=12))
def test_every_wait_ends_at_its_deadline(deadlines: list[int]) -> None:
    queue = WaitingQueue()
    for sequence, deadline in enumerate(deadlines):
        queue.push(make(sequence, deadline_ns=deadline))
    for now in range(21):
        for request in queue.expired(now):
            queue.remove(request)
        assert all(r.deadline_ns > now or not r.deadline_ns for r in queue.first(99))
    assert len(queue) == deadlines.count(0)
