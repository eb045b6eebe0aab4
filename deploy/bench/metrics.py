"""Computes the results from the outcomes of requests, with the names of `vllm bench serve`'s JSON.

TTFT     from sending a request (connecting included) to its first chunk with tokens
TPOT     (end - first chunk) / (output tokens - 1), per request with at least 2 tokens; the first
         token is left out because its time is that of the prefill
ITL      between two successive chunks with tokens, over all requests. A chunk may hold several
         tokens (accepted drafts, or held-back text); `tokens_per_chunk` is the average
E2EL     from sending a request to its last chunk
throughput  requests, or tokens of complete replies, divided by `duration`: from before the first
         request is sent to the end of the last
Each time has mean, median, standard deviation, p90, p95 and p99 (linear interpolation). Failed
requests are not part of these figures; they are counted by reason.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .stream import Outcome

PERCENTILES = (90, 95, 99)
TIMES = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True)
class Run:
    """One outcome per request, total seconds, and CPU seconds of this process."""

    outcomes: list[Outcome]
    duration_s: float
    cpu_s: float
    max_running: int


def summarize(run: Run) -> dict[str, Any]:
    """All figures as JSON values. A time without any measurement is None."""
    good = [o for o in run.outcomes if o.error is None]
    failures = Counter(o.error for o in run.outcomes if o.error is not None)
    inputs = sum(o.prompt_tokens for o in good)
    outputs = sum(o.output_tokens for o in good)
    chunks = sum(o.num_chunks for o in good)
    seconds = max(run.duration_s, 1e-9)
    times = {
        "ttft": [o.ttft_s for o in good],
        "tpot": tpots(good),
        "itl": [gap for o in good for gap in o.gaps_s],
        "e2el": [o.e2e_s for o in good],
    }
    spread = {k: v for name in TIMES for k, v in _spread(name, times[name]).items()}
    mean_tpot, ttft_sum = spread["mean_tpot_ms"], sum(times["ttft"])
    return {
        "duration": run.duration_s,
        "completed": len(good),
        "failed": len(run.outcomes) - len(good),
        "failures": [{"reason": r, "count": n} for r, n in failures.most_common()],
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        **spread,
        "decode_tokens_per_s_per_stream": 1000 / mean_tpot if mean_tpot else None,
        "prefill_tokens_per_s_per_stream": inputs / ttft_sum if ttft_sum else None,
        "max_concurrent_requests": run.max_running,
        "tokens_per_chunk": outputs / chunks if chunks else None,
        "short_replies": sum(o.output_tokens < o.wanted_tokens for o in good),
        "counted_by": dict(Counter(o.counted_by for o in good)),
        "client_cpu_share": run.cpu_s / seconds,
    }


def details(run: Run) -> list[dict[str, Any]]:
    """One JSON object per request, in the order of sending; times in seconds, `start` on the
    benchmark's clock."""
    first = min((o.start_s for o in run.outcomes), default=0.0)
    return [
        {
            "start": o.start_s - first,
            "prompt_tokens": o.prompt_tokens,
            "output_tokens": o.output_tokens,
            "ttft": o.ttft_s,
            "e2el": o.e2e_s,
            "itl": o.gaps_s,
            "error": o.error,
        }
        for o in sorted(run.outcomes, key=lambda o: o.start_s)
    ]


def tpots(outcomes: Sequence[Outcome]) -> list[float]:
    """Seconds per output token after the first, of each request with at least two."""
    return [(o.e2e_s - o.ttft_s) / (o.output_tokens - 1) for o in outcomes if o.output_tokens > 1]


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` percent of `ordered` (ascending, not empty) are."""
    position = (len(ordered) - 1) * share / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, median and so on in milliseconds."""
    ordered = sorted(1000 * s for s in seconds)
    names = ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))
    if not ordered:
        return {f"{statistic}_{name}_ms": None for statistic in names}
    values = (
        statistics.fmean(ordered),
        percentile(ordered, 50),
        statistics.pstdev(ordered),
        *(percentile(ordered, p) for p in PERCENTILES),
    )
    return {f"{s}_{name}_ms": value for s, value in zip(names, values, strict=True)}
