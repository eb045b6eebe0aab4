"""Prometheus metrics: LightLLM's names and types, those of vLLM, and our own.

Metrics of requests are counted here when a request ends. The launcher adds up those of all HTTP
processes (`totals.py`), so a scrape of any process shows the whole server. Metrics of the engine
are in `engine_metrics.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...shared.config import ServeConfig
from ...shared.errors import HttpError
from ...shared.log import dropped_lines
from ...shared.messages import STEP_SECONDS
from ..grammar.checker import GrammarChecker
from ..wire.connection import Connections
from .client import EngineClient
from .engine_metrics import DROPPED_LINES, DROPPED_MESSAGES, MALFORMED, EngineCollector
from .tally import Tally

REQUESTS = "lightllm_request_count"
FAILURES = "lightllm_request_failure"
_SUCCESSES = "lightllm_request_success"
_FINISHED = "vllm:request_success"
_ABORTED = "glimmer_aborted_requests"
_REJECTED = "glimmer_rejections"
_FINISH_REASONS = ("stop", "length", "abort", "error")
_REJECTIONS = (
    "invalid too_large not_found unauthorized forbidden overloaded key_limit unavailable error"
).split()
# Name, help, label, its values.
_COUNTERS = (
    (REQUESTS, "requests received", "", ("",)),
    (_SUCCESSES, "requests answered", "", ("",)),
    (FAILURES, "requests that ended in an error of the server or were refused", "", ("",)),
    ("lightllm_prompt_tokens", "prompt tokens of answered requests", "", ("",)),
    ("lightllm_generation_tokens", "tokens generated for answered requests", "", ("",)),
    ("vllm:prompt_tokens", "prompt tokens of answered requests", "", ("",)),
    ("vllm:prompt_tokens_cached", "of these, found in the prefix cache", "", ("",)),
    (_FINISHED, "sequences that ended, by reason", "finished_reason", _FINISH_REASONS),
    (_ABORTED, "requests that were aborted, by cause", "cause", ("disconnect", "asked")),
    (_REJECTED, "requests that got an error instead of output", "reason", _REJECTIONS),
)
_SECONDS = STEP_SECONDS
_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15),
    *(0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0),
)
_FIRST_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_WHOLE_SECONDS = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_RATIOS = tuple(k / 10 for k in range(11))
_TOKENS_PER_STEP = tuple(1 + k / 10 for k in range(71))  # at most 7 drafts
# Name, attribute of `RequestRecord`, help, buckets (None: up to the maximum length in tokens).
_HISTOGRAMS = (
    ("lightllm_request_duration", "total_s", "from arrival to the last byte, s", _SECONDS),
    (
        "lightllm_request_validation_duration",
        "submitted_s",
        "from arrival to being handed to the scheduler, s",
        _SECONDS,
    ),
    (
        "lightllm_request_inference_duration",
        "inference_s",
        "from being handed to the scheduler to the end, s",
        _SECONDS,
    ),
    (
        "lightllm_request_mean_time_per_token_duration",
        "per_token_s",
        "after the first token, per token, s",
        _SECONDS,
    ),
    (
        "lightllm_request_first_token_duration",
        "first_token_s",
        "from arrival to the first token, s",
        _SECONDS,
    ),
    (
        "lightllm_request_queue_duration_bucket",
        "queue_s",
        "from being handed to the scheduler to the first step, s",
        _SECONDS,
    ),
    ("lightllm_request_input_length", "num_prompt_tokens", "prompt tokens", None),
    ("lightllm_request_generated_tokens", "num_output_tokens", "output tokens", None),
    ("lightllm_request_max_new_tokens", "max_new_tokens", "output limit", None),
    ("lightllm_cache_length", "num_cached_tokens", "prompt tokens found", None),
    ("lightllm_cache_ratio", "cache_ratio", "part of prompt found", _RATIOS),
    (
        "lightllm_request_mtp_avg_token_per_step",
        "tokens_per_step",
        "tokens per decode step",
        _TOKENS_PER_STEP,
    ),
    ("vllm:time_to_first_token_seconds", "first_token_s", "from arrival", _FIRST_SECONDS),
    (
        "vllm:request_time_per_output_token_seconds",
        "per_token_s",
        "mean time of a token after the first",
        _TOKEN_SECONDS,
    ),
    ("vllm:e2e_request_latency_seconds", "total_s", "from arrival to the end", _WHOLE_SECONDS),
    ("vllm:request_queue_time_seconds", "queue_s", "until the first step", _WHOLE_SECONDS),
    (
        "vllm:request_prefill_time_seconds",
        "prefill_s",
        "from the first step to the first token",
        _WHOLE_SECONDS,
    ),
    (
        "vllm:request_decode_time_seconds",
        "decode_s",
        "from the first token to the end",
        _WHOLE_SECONDS,
    ),
    ("vllm:request_inference_time_seconds", "engine_s", "prefill and decode", _WHOLE_SECONDS),
    ("vllm:request_prompt_tokens", "num_prompt_tokens", "prompt tokens", None),
    ("vllm:request_generation_tokens", "num_output_tokens", "output tokens", None),
)


@dataclass(frozen=True)
class RequestRecord:
    """Figures of one request that has ended, for metrics and for its log line."""

    submitted_s: float = 0.0  # times are durations since arrival
    first_token_s: float = 0.0
    total_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    max_new_tokens: int = 0
    tokens_per_step: float = 1.0

    @property
    def inference_s(self) -> float:
        """Time in the engine."""
        return self.total_s - self.submitted_s

    @property
    def engine_s(self) -> float:
        """Time on the workers."""
        return self.prefill_s + self.decode_s

    @property
    def per_token_s(self) -> float:
        """Mean time of a token after the first."""
        return (self.total_s - self.first_token_s) / max(1, self.num_output_tokens - 1)

    @property
    def cache_ratio(self) -> float:
        """Fraction of the prompt found in the prefix cache."""
        return self.num_cached_tokens / max(1, self.num_prompt_tokens)


class Metrics:
    """All metrics of this process. `render` is the body of `/metrics`."""

    def __init__(self, config: ServeConfig, max_req_total_len: int, client: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self.tally = Tally()
        lengths = tuple(max_req_total_len * k / 100 for k in range(101))
        for name, text, label, keys in _COUNTERS:
            self.tally.counter(name, text, label, keys)
        for name, _, text, bounds in _HISTOGRAMS:
            self.tally.histogram(name, text, bounds or lengths)
        # Of each HTTP process; `engine_metrics.py` shows them beside those of other processes.
        self.tally.follow(DROPPED_LINES, "", dropped_lines)
        self.tally.follow(DROPPED_MESSAGES, "", lambda: client.dropped)
        self.tally.follow(MALFORMED, "", lambda: client.malformed)
        labels = {"model_name": config.model_name}
        requests = _RequestCollector(self.tally, client, labels)
        self._requests = requests
        self.registry.register(requests)
        self.registry.register(EngineCollector(client, labels, config.page_size, requests.value))

    def follow(self, connections: Connections, grammars: GrammarChecker) -> None:
        """Count what other parts of this process count, too."""
        follow = self.tally.follow
        follow(
            "glimmer_slow_clients_cut",
            "connections cut because the client did not read or write",
            lambda: connections.num_cut,
        )
        follow(
            "glimmer_connections_refused",
            "because all file descriptors were in use",
            lambda: connections.num_refused,
        )
        follow(
            "glimmer_grammar_timeouts",
            "schemas and grammars whose check took too long",
            lambda: grammars.num_timeouts,
        )

    def follow_traces(self, num_dropped: Callable[[], int]) -> None:
        """Count trace spans that were not delivered."""
        text = "trace spans that the collector did not take"
        self.tally.follow("glimmer_trace_spans_dropped", text, num_dropped)

    def observe(self, record: RequestRecord) -> None:
        """One request was answered."""
        tally = self.tally
        for name, attribute, _, _ in _HISTOGRAMS:
            tally.observe(name, getattr(record, attribute))
        tally.count(_SUCCESSES)
        for engine in ("lightllm_", "vllm:"):
            tally.count(engine + "prompt_tokens", record.num_prompt_tokens)
        tally.count("vllm:prompt_tokens_cached", record.num_cached_tokens)
        tally.count("lightllm_generation_tokens", record.num_output_tokens)
        self._requests.hit_rate = record.cache_ratio

    def end(self, reasons: Sequence[str], is_disconnected: bool) -> None:
        """The sequences of one request have ended for these reasons."""
        for reason in reasons:
            self.tally.count(_FINISHED, key=reason)
        if is_disconnected or "abort" in reasons:
            self.tally.count(_ABORTED, key="disconnect" if is_disconnected else "asked")

    def reject(self, error: HttpError) -> None:
        """A request got this error instead of output."""
        self.tally.count(_REJECTED, key=error.reason)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)


class _RequestCollector(Collector):
    """The counts of all HTTP processes, or of this one alone if no launcher adds it up."""

    def __init__(self, tally: Tally, client: EngineClient, labels: dict[str, str]) -> None:
        self._tally, self._client, self._labels = tally, client, labels
        self.hit_rate = 0.0

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._tally.collect(self._values(), self._labels)
        gauge = GaugeMetricFamily(
            "lightllm_cache_hit_rate",
            "part of the last request's prompt found in the prefix cache",
            labels=list(self._labels),
        )
        gauge.add_metric(list(self._labels.values()), self.hit_rate)
        yield gauge

    def value(self, name: str) -> float:
        """The sum of one counter that has no label."""
        return self._tally.value(self._values(), name)

    def _values(self) -> Sequence[float]:
        self._tally.refresh()
        launcher = self._client.state.launcher
        totals = launcher.totals if launcher else []
        return totals if len(totals) == len(self._tally.values) else self._tally.values
