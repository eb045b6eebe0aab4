"""The figures of outcomes that can be worked out by hand."""

import itertools

import pytest
from glimmer.deploy.bench.metrics import Run, details, percentile, summarize
from glimmer.deploy.bench.stream import Outcome


def outcome(start_s: float, times_s: list[float], tokens: int, error: str | None = None) -> Outcome:
    """A request whose chunks came at `times_s`; it ends with the last."""
    gaps = [b - a for a, b in itertools.pairwise(times_s)]
    ttft_s = times_s[0] - start_s
    return Outcome(start_s, 100, 4, tokens, "usage", ttft_s, times_s[-1], gaps, error)


RUN = Run(
    [
        outcome(10.0, [10.5, 10.6, 10.8], 3),
        outcome(11.0, [12.5, 13.5], 5),  # several tokens per chunk
        outcome(11.0, [11.1], 1),
        outcome(10.0, [19.0], 9, "HTTP 500: x"),
    ],
    duration_s=4.0,
    cpu_s=0.2,
    max_running=3,
)


def test_the_first_token_is_not_in_the_time_per_token() -> None:
    figures = summarize(RUN)
    # (10.8 - 10.5) / 2 and (13.5 - 12.5) / 4; one token has none
    assert figures["mean_tpot_ms"] == pytest.approx((150 + 250) / 2)
    assert figures["decode_tokens_per_s_per_stream"] == pytest.approx(5)


def test_times_are_those_of_whole_replies() -> None:
    figures = summarize(RUN)
    assert figures["mean_ttft_ms"] == pytest.approx((500 + 1500 + 100) / 3)
    assert figures["median_ttft_ms"] == pytest.approx(500)
    assert figures["mean_itl_ms"] == pytest.approx((100 + 200 + 1000) / 3)
    assert figures["p90_e2el_ms"] == pytest.approx(800 + 0.8 * 1700)
    assert figures["std_e2el_ms"] == pytest.approx(1007.75, abs=0.01)
    assert figures["prefill_tokens_per_s_per_stream"] == pytest.approx(300 / 2.1)


def test_throughput_is_that_of_whole_replies() -> None:
    figures = summarize(RUN)
    assert (figures["completed"], figures["failed"]) == (3, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (300, 9)
    assert figures["request_throughput"] == 0.75
    assert figures["output_throughput"] == 2.25
    assert figures["total_token_throughput"] == pytest.approx(309 / 4)
    assert figures["tokens_per_chunk"] == 1.5
    assert figures["short_replies"] == 2
    assert figures["counted_by"] == {"usage": 3}
    assert figures["client_cpu_share"] == 0.05


def test_failures_are_counted_by_reason() -> None:
    errors = ["b", "a", "b"]
    figures = summarize(Run([outcome(0, [1], 1, e) for e in errors], 1.0, 0.0, 3))
    assert figures["failures"] == [{"reason": "b", "count": 2}, {"reason": "a", "count": 1}]
    assert (figures["completed"], figures["failed"]) == (0, 3)
    assert figures["mean_ttft_ms"] is figures["p99_itl_ms"] is figures["tokens_per_chunk"] is None
    assert figures["output_throughput"] == 0


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([1, 2, 3, 4], 50) == 2.5
    assert percentile([1, 2], 99) == pytest.approx(1.99)
    assert percentile([7], 95) == 7
    assert percentile([1, 2, 3], 100) == 3


def test_details_are_in_the_order_of_sending() -> None:
    rows = details(RUN)
    assert [row["start"] for row in rows] == [0, 0, 1, 1]
    assert rows[0]["itl"] == pytest.approx([0.1, 0.2])
    assert rows[1]["error"] == "HTTP 500: x"
    assert rows[3]["e2el"] == pytest.approx(0.1)
