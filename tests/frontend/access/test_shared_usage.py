"""Limits of keys hold for all HTTP processes together."""

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from glimmer.frontend.access.keys import Limits
from glimmer.frontend.access.meter import Meter
from glimmer.frontend.access.shared_usage import Usage, UsageTable
from glimmer.frontend.context import RequestContext
from glimmer.shared.errors import OverloadedError

NO_CONNECTION: Any = None


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("usage")
    yield fd
    os.close(fd)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def meters(fd: int, limits: Limits, clock: Clock | None = None, count: int = 3) -> list[Meter]:
    """The same user in each of several processes."""
    clock = clock or Clock()
    tables = [UsageTable(fd, index, count) for index in range(count)]
    return [Meter(limits, clock, table.of("alice")) for table in tables]


@contextlib.contextmanager
def request(meter: Meter, num_tokens: int = 0) -> Iterator[Any]:
    context = RequestContext("x", 0.0, NO_CONNECTION)
    with meter.admitted(context):
        assert context.charge is not None
        context.charge.take_prompts([[1] * num_tokens])
        job = SimpleNamespace(first_token_s=None, num_outputs=0)
        job.usage = lambda: SimpleNamespace(output_tokens=job.num_outputs)
        context.job = job  # type: ignore[assignment]
        yield job


def test_open_requests_are_counted_together(fd: int) -> None:
    first, second, third = meters(fd, Limits(requests=2))
    with request(first):
        with request(second):
            for meter in (first, second, third):
                with pytest.raises(OverloadedError, match="2 requests of this key are open"):
                    meter.check()
                with pytest.raises(OverloadedError, match="2 requests"), request(meter):
                    pass
            assert third.headers()["x-ratelimit-remaining-requests"] == "0"
        with request(third):
            pass
    assert [meter.open for meter in (first, second, third)] == [[], [], []]


def test_tokens_of_a_minute_and_waiting_ones_are_counted_together(fd: int) -> None:
    clock = Clock()
    first, second, _ = meters(fd, Limits(queued_tokens=100, tokens_per_minute=600), clock)
    with request(first, 90) as job:
        with pytest.raises(OverloadedError, match="90 prompt tokens"), request(second, 20):
            pass
        job.first_token_s, job.num_outputs = 1.0, 10
        first.settle()
        with request(second, 20):
            assert second.headers()["x-ratelimit-remaining-tokens"] == "480"
    with request(second, 490):
        pass
    with pytest.raises(OverloadedError, match="600 tokens per minute"):
        first.check()
    clock.now += 2
    first.check()
    assert first.balance == second.balance + 20 == 10  # the second has not looked yet
    second.settle()
    assert second.balance == 10


def test_a_successor_forgets_open_requests_and_keeps_used_tokens(fd: int) -> None:
    limits = Limits(requests=2, tokens_per_minute=600)
    first, second, _ = meters(fd, limits)
    stack = contextlib.ExitStack()
    for _ in range(2):
        stack.enter_context(request(first, 100))
    with pytest.raises(OverloadedError):
        second.check()
    successor = Meter(limits, Clock(), UsageTable(fd, 0, 3).of("alice"))
    second.check()
    with request(successor, 50):
        second.settle()
    assert second.balance == 600 - 250


def test_users_have_rows_of_their_own_until_the_table_is_full(fd: int) -> None:
    table, other = UsageTable(fd, 0, 2), UsageTable(fd, 1, 2)
    for number in range(8192):
        row = table.of(f"user-{number}")
        assert row is not None
        row.publish(Usage(number, 2 * number, 3 * number))
    assert table.of("one more") is None
    for number in (0, 4000, 8191):
        row = other.of(f"user-{number}")
        assert row is not None
        assert row.others() == Usage(number, 2 * number, 3 * number)
