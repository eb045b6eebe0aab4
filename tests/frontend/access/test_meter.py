"""The limits of one user: open requests, waiting prompt tokens, tokens per minute."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from glimmer.frontend.access.keys import Limits
from glimmer.frontend.access.meter import Charge, Meter
from glimmer.frontend.context import RequestContext
from glimmer.shared.errors import OverloadedError
from hypothesis import given
from hypothesis import strategies as st

NO_CONNECTION: Any = None


@dataclass
class FakeJob:
    """What the meter looks at."""

    first_token_s: float | None = None
    num_outputs: int = 0

    def usage(self) -> Any:
        return SimpleNamespace(output_tokens=self.num_outputs)


@dataclass
class Bench:
    """A meter with a clock that the test sets."""

    limits: Limits
    now: float = 100.0
    meter: Meter = field(init=False)

    def __post_init__(self) -> None:
        self.meter = Meter(self.limits, lambda: self.now)

    @contextlib.contextmanager
    def request(self, num_prompt_tokens: int = 0) -> Iterator[FakeJob]:
        context, job = RequestContext("x", self.now, NO_CONNECTION), FakeJob()
        with self.meter.admitted(context):
            charge = context.charge
            assert isinstance(charge, Charge)
            charge.take_prompts([[1] * num_prompt_tokens])
            context.job = job  # type: ignore[assignment]
            yield job

    def refusal(self, num_prompt_tokens: int = 1) -> OverloadedError:
        with pytest.raises(OverloadedError) as caught, self.request(num_prompt_tokens):
            raise AssertionError("accepted")
        return caught.value


def test_without_limits_nothing_is_refused_or_told() -> None:
    bench = Bench(Limits())
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(bench.request(1000)).num_outputs = 500
    assert bench.meter.headers() == {}
    assert not bench.meter.open


def test_only_so_many_requests_are_open() -> None:
    bench = Bench(Limits(requests=2))
    with bench.request(), bench.request():
        assert bench.meter.headers()["x-ratelimit-remaining-requests"] == "0"
        error = bench.refusal()
        assert (error.status, error.retry_after_s) == (429, 1.0)
        assert "2 requests of this key are open" in str(error)
    assert bench.meter.headers() == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "2",
    }


def test_a_request_that_fails_is_not_open_any_more() -> None:
    bench = Bench(Limits(requests=1))
    with pytest.raises(RuntimeError), bench.request():
        raise RuntimeError
    with bench.request():
        pass


def test_prompts_wait_until_their_first_token() -> None:
    bench = Bench(Limits(queued_tokens=100))
    with bench.request(500) as large, contextlib.ExitStack() as stack:
        assert "500 prompt tokens of this key are waiting" in str(bench.refusal(1))
        large.first_token_s = 0.1
        first = stack.enter_context(bench.request(60))
        stack.enter_context(bench.request(40))
        bench.refusal(1)
        first.first_token_s = 0.1
        stack.enter_context(bench.request(60))


def test_prompts_and_outputs_come_from_the_tokens_of_a_minute() -> None:
    bench = Bench(Limits(tokens_per_minute=600))
    with bench.request(500) as job:
        job.num_outputs = 40
        assert bench.meter.headers() == {
            "x-ratelimit-limit-tokens": "600",
            "x-ratelimit-remaining-tokens": "60",
            "x-ratelimit-reset-tokens": "54.000s",
        }
        job.num_outputs = 70
    assert bench.meter.headers()["x-ratelimit-remaining-tokens"] == "30"
    with bench.request(1000):  # as there is some left
        pass
    error = bench.refusal(0)
    assert error.retry_after_s == pytest.approx(97.1)
    assert "600 tokens per minute" in str(error)
    bench.now += error.retry_after_s
    with bench.request(0):
        pass
    bench.now += 3600
    assert bench.meter.headers()["x-ratelimit-remaining-tokens"] == "600"


def test_requests_that_begin_together_do_not_all_overdraw() -> None:
    bench = Bench(Limits(tokens_per_minute=100))
    contexts = [RequestContext(str(n), 0.0, NO_CONNECTION) for n in range(3)]
    with contextlib.ExitStack() as stack:
        for context in contexts:  # all are being tokenized
            stack.enter_context(bench.meter.admitted(context))
        charges = [context.charge for context in contexts if context.charge is not None]
        charges[0].take_prompts([[1] * 90])
        charges[1].take_prompts([[1] * 90])
        with pytest.raises(OverloadedError):
            charges[2].take_prompts([[1] * 90])


def test_limits_change_while_requests_are_open() -> None:
    bench = Bench(Limits())
    with bench.request(50) as job:
        job.num_outputs = 1000
        bench.meter.change_limits(Limits(requests=1, tokens_per_minute=60))
        assert bench.meter.headers()["x-ratelimit-remaining-tokens"] == "60"
        bench.refusal()
        job.num_outputs = 1010
    assert bench.meter.headers()["x-ratelimit-remaining-tokens"] == "50"
    bench.meter.change_limits(Limits())
    with bench.request(1), bench.request(1):
        pass


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 20), st.integers(0, 300), st.integers(0, 300)), max_size=60),
)
def test_in_the_long_run_the_limit_is_kept(
    per_minute: int, steps: list[tuple[float, int, int]]
) -> None:
    bench = Bench(Limits(tokens_per_minute=per_minute), now=0.0)
    used = largest = 0
    for pause, num_prompt, num_outputs in steps:
        bench.now += pause
        with contextlib.suppress(OverloadedError), bench.request(num_prompt) as job:
            job.num_outputs = num_outputs
            used += num_prompt + num_outputs
            largest = max(largest, num_prompt + num_outputs)
        assert used <= per_minute * (1 + bench.now / 60) + largest
