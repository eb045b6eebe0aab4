"""Prometheus metrics: LightLLM's names and types, aliases that gateways look for, and our own.

Metrics of requests are observed here when a request ends. Metrics of the engine are read from the
scheduler's last heartbeat when `/metrics` is requested. With several HTTP processes, a scrape
reaches one of them, so each labels its metrics with its number; the sum over `frontend` is the
total.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ...shared.config import ServeConfig
from ...shared.log import dropped_lines
from ...shared.messages import BATCH_SIZES, STEP_SECONDS, Heartbeat, LauncherBeat
from .client import EngineClient

_SECONDS = list(STEP_SECONDS)
_RATIOS = [k / 10 for k in range(11)]
_TOKENS_PER_STEP = [1 + k / 10 for k in range(71)]  # at most 7 drafts
_COUNTERS = {
    "request_count": "requests received",
    "request_success": "requests answered",
    "request_failure": "requests that ended in an error of the server or were refused",
    "prompt_tokens": "prompt tokens of answered requests",
    "generation_tokens": "tokens generated for answered requests",
}
# Name, attribute of `RequestRecord`, help, buckets (None: up to the maximum length in tokens).
_HISTOGRAMS = (
    ("request_duration", "total_s", "from arrival to the last byte, s", _SECONDS),
    (
        "request_validation_duration",
        "submitted_s",
        "from arrival to being handed to the scheduler, s",
        _SECONDS,
    ),
    (
        "request_inference_duration",
        "inference_s",
        "from being handed to the scheduler to the end, s",
        _SECONDS,
    ),
    (
        "request_mean_time_per_token_duration",
        "per_token_s",
        "after the first token, per token, s",
        _SECONDS,
    ),
    (
        "request_first_token_duration",
        "first_token_s",
        "from arrival to the first token, s",
        _SECONDS,
    ),
    (
        "request_queue_duration_bucket",
        "queue_s",
        "from being handed to the scheduler to the first step, s",
        _SECONDS,
    ),
    ("request_input_length", "num_prompt_tokens", "prompt tokens", None),
    ("request_generated_tokens", "num_output_tokens", "output tokens", None),
    ("request_max_new_tokens", "max_new_tokens", "output limit", None),
    ("cache_length", "num_cached_tokens", "prompt tokens found", None),
    ("cache_ratio", "cache_ratio", "part of prompt found", _RATIOS),
    (
        "request_mtp_avg_token_per_step",
        "tokens_per_step",
        "tokens per decode step",
        _TOKENS_PER_STEP,
    ),
)


@dataclass(frozen=True)
class RequestRecord:
    """Figures of one request that has ended, for metrics and for its log line."""

    submitted_s: float = 0.0  # times are durations since arrival
    first_token_s: float = 0.0
    total_s: float = 0.0
    queue_s: float = 0.0
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
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        engine_labels = {"model_name": config.model_name}
        self._labels = dict(engine_labels)
        if config.httpserver_workers > 1:
            self._labels["frontend"] = str(client.index)
        lengths = [max_req_total_len * k / 100 for k in range(101)]
        self._counters = {
            name: Counter(
                f"lightllm_{name}", text, list(self._labels), registry=self.registry
            ).labels(**self._labels)
            for name, text in _COUNTERS.items()
        }
        self.requests = self._counters["request_count"]
        self.failures = self._counters["request_failure"]
        self._histograms = {
            attribute: self._histogram(name, text, buckets or lengths)
            for name, attribute, text, buckets in _HISTOGRAMS
        }
        self._hit_rate = Gauge(
            "lightllm_cache_hit_rate",
            "part of the last request's prompt found in the prefix cache",
            list(self._labels),
            registry=self.registry,
        ).labels(**self._labels)
        self.registry.register(_EngineCollector(client, engine_labels, config.page_size))

    def observe(self, record: RequestRecord) -> None:
        """One request was answered."""
        for attribute, histogram in self._histograms.items():
            histogram.observe(getattr(record, attribute))
        self._counters["request_success"].inc()
        self._counters["prompt_tokens"].inc(record.num_prompt_tokens)
        self._counters["generation_tokens"].inc(record.num_output_tokens)
        self._hit_rate.set(record.cache_ratio)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(
            f"lightllm_{name}",
            text,
            list(self._labels),
            buckets=list(buckets),
            registry=self.registry,
        ).labels(**self._labels)


class _EngineCollector(Collector):
    """Reads the client's state when `/metrics` is rendered."""

    def __init__(self, client: EngineClient, labels: dict[str, str], page_size: int) -> None:
        self._client, self._page_size = client, page_size
        self._names, self._values = list(labels), list(labels.values())

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters of the scheduler's last heartbeat; nothing before the first."""
        ready = 0.0 if self._client.state.why_unready(time.monotonic()) else 1.0
        yield self._gauge("glimmer_ready", "whether new requests should come here", ready)
        yield from self._operation()
        heartbeat = self._client.state.heartbeat
        if heartbeat is None:
            return
        gauges = _gauges(heartbeat, self._client.state.generated_per_s)
        for name, (text, value) in gauges.items():
            yield self._gauge(name, text, value)
        for name, (text, value) in _counters(heartbeat, self._client.malformed).items():
            family = CounterMetricFamily(name, text, labels=self._names)
            family.add_metric(self._values, value)
            yield family
        yield from self._steps(heartbeat)
        yield from self._drafts(heartbeat)
        labels = {"block_size": str(self._page_size), "num_gpu_blocks": str(heartbeat.pages_total)}
        cache = GaugeMetricFamily(
            "vllm:cache_config_info", "size of the KV cache", labels=[*self._names, *labels]
        )
        cache.add_metric([*self._values, *labels.values()], 1)
        yield cache

    def _operation(self) -> Iterator[Metric]:
        """Restarts, and what was dropped by which process."""
        state = self._client.state
        launcher, beat = state.launcher or LauncherBeat(), state.heartbeat
        silence = state.launcher_silence_s(time.monotonic())
        yield self._gauge(
            "glimmer_launcher_silence_seconds", "time since the launcher was heard", silence
        )
        lines = {"frontend": dropped_lines(), "launcher": launcher.dropped_log_lines}
        messages = {"frontend": self._client.dropped, "launcher": launcher.dropped_messages}
        if beat is not None:
            lines["scheduler"], messages["scheduler"] = (
                beat.dropped_log_lines,
                beat.dropped_messages,
            )
        restarts = {"engine": launcher.engine_restarts, "frontend": launcher.frontend_restarts}
        for name, text, label, values in (
            ("glimmer_restarts", "processes replaced after a loss", "unit", restarts),
            ("glimmer_log_lines_dropped", "because stderr was not read", "process", lines),
            (
                "glimmer_messages_dropped",
                "because their receiver did not read",
                "process",
                messages,
            ),
        ):
            family = CounterMetricFamily(name, text, labels=[*self._names, label])
            for key, value in values.items():
                family.add_metric([*self._values, key], value)
            yield family

    def _steps(self, beat: Heartbeat) -> Iterator[Metric]:
        """LightLLM's metrics of steps: number, duration and rows, by kind."""
        names = [*self._names, "method"]
        count = CounterMetricFamily("lightllm_batch_inference_count", "steps run", labels=names)
        name = "lightllm_batch_inference_duration_bucket"
        duration = HistogramMetricFamily(name, "time of a step, s", labels=names)
        for method, times in (("prefill", beat.prefill_steps), ("decode", beat.decode_steps)):
            values = [*self._values, method]
            count.add_metric(values, sum(times.counts))
            duration.add_metric(values, _buckets(STEP_SECONDS, times.counts), times.total_s)
        sizes = HistogramMetricFamily(
            "lightllm_batch_next_size", "requests in the next batch", labels=self._names
        )
        buckets = _buckets(BATCH_SIZES, beat.batch_sizes)
        sizes.add_metric(self._values, buckets, beat.batch_rows)
        yield from (count, duration, sizes)

    def _drafts(self, beat: Heartbeat) -> Iterator[Metric]:
        """For each draft position: drafts verified, and drafts accepted."""
        names = [*self._names, "position"]
        counts = {
            "glimmer_drafts": ("drafts verified", beat.drafts_offered),
            "glimmer_drafts_accepted": ("drafts accepted", beat.drafts_accepted),
        }
        for name, (text, values) in counts.items():
            family = CounterMetricFamily(name, text, labels=names)
            for position, value in enumerate(values, 1):
                family.add_metric([*self._values, str(position)], value)
            yield family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=self._names)
        family.add_metric(self._values, value)
        return family


def _gauges(beat: Heartbeat, generated_per_s: float) -> dict[str, tuple[str, float]]:
    in_use = kv_usage(beat)
    return {
        "lightllm_batch_current_size": ("running requests", beat.num_running),
        "lightllm_batch_pause_size": ("preempted requests", beat.num_paused),
        "lightllm_queue_size": ("waiting requests", beat.num_waiting),
        "lightllm_batch_current_max_tokens": ("estimated peak tokens", beat.estimated_peak_tokens),
        "lightllm_num_running_reqs": ("running requests", beat.num_running),
        "lightllm_gen_throughput": ("tokens generated per second", generated_per_s),
        "vllm:num_requests_running": ("running requests", beat.num_running),
        "vllm:num_requests_waiting": ("waiting requests", beat.num_waiting + beat.num_paused),
        "vllm:kv_cache_usage_perc": ("used part of the KV pages, 0..1", in_use),
        "vllm:gpu_cache_usage_perc": ("used part of the KV pages, 0..1", in_use),
        "glimmer_pages": ("KV pages", beat.pages_total),
        "glimmer_pages_free": ("KV pages never or no longer used", beat.pages_free),
        "glimmer_pages_cached": ("KV pages of the prefix cache alone", beat.pages_cached),
        "glimmer_draft_length": ("drafts per row in the last step", beat.draft_length),
        "glimmer_mtp_avg_token_per_step": (
            "tokens per row and decode step since the start",
            1 + sum(beat.drafts_accepted) / max(1, beat.decoded_rows),
        ),
        "glimmer_schedule_seconds": ("mean time to plan one step", beat.step_us / 1e6),
    }


def _counters(beat: Heartbeat, malformed: int) -> dict[str, tuple[str, float]]:
    return {
        "glimmer_steps": ("steps run", beat.steps),
        "glimmer_preemptions": ("requests preempted", beat.preemptions),
        "glimmer_prefix_queries": ("prompt tokens looked up", beat.prefix_queries),
        "glimmer_prefix_hits": ("prompt tokens found", beat.prefix_hits),
        "vllm:prefix_cache_queries": ("prompt tokens looked up", beat.prefix_queries),
        "vllm:num_preemptions": ("requests preempted", beat.preemptions),
        "vllm:generation_tokens": ("tokens generated", beat.generated_tokens),
        "vllm:prefix_cache_hits": ("prompt tokens found", beat.prefix_hits),
        "glimmer_generated_tokens": ("tokens generated", beat.generated_tokens),
        "glimmer_malformed_messages": (
            "messages dropped by the scheduler and here",
            beat.malformed_messages + malformed,
        ),
    }


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Counts per bucket -> Prometheus's cumulative ones, with the upper bounds as text."""
    counts = counts or [0] * (len(bounds) + 1)
    limits = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(limits, itertools.accumulate(map(float, counts)), strict=True))


def kv_usage(beat: Heartbeat) -> float:
    """Fraction of the KV pages that requests hold. Pages only in the prefix cache do not count."""
    used = beat.pages_total - beat.pages_free - beat.pages_cached
    return used / max(1, beat.pages_total)
