"""Metrics of the engine and of the processes, read when `/metrics` is rendered.

They come from the scheduler's last heartbeat and from the launcher's. Every HTTP process hears the
same, so they are not added up.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ...shared.messages import (
    BATCH_SIZES,
    STEP_SECONDS,
    STEP_TOKENS,
    Heartbeat,
    LauncherBeat,
)
from .client import EngineClient
from .tally import cumulative

# Counters of all HTTP processes together
DROPPED_LINES, DROPPED_MESSAGES, MALFORMED = "log_lines", "messages", "malformed"


class EngineCollector(Collector):
    """Reads the client's state when `/metrics` is rendered."""

    def __init__(
        self,
        client: EngineClient,
        labels: dict[str, str],
        page_size: int,
        sum_of: Callable[[str], float],
    ) -> None:
        """`sum_of` returns a counter of all HTTP processes together."""
        self._client, self._page_size, self._sum_of = client, page_size, sum_of
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
        for name, (text, value) in _counters(heartbeat, int(self._sum_of(MALFORMED))).items():
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
        lines: dict[str, float] = {
            "frontend": self._sum_of(DROPPED_LINES),
            "launcher": launcher.dropped_log_lines,
            "worker": launcher.worker_log_lines,
        }
        messages: dict[str, float] = {
            "frontend": self._sum_of(DROPPED_MESSAGES),
            "launcher": launcher.dropped_messages,
        }
        if beat is not None:
            lines["scheduler"], messages["scheduler"] = (
                beat.dropped_log_lines,
                beat.dropped_messages,
            )
        stalls = CounterMetricFamily(
            "glimmer_stalls", "steps that took far too long", labels=self._names
        )
        stalls.add_metric(self._values, launcher.stalls)
        yield stalls
        yield from self._gpus(launcher)
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

    def _gpus(self, launcher: LauncherBeat) -> Iterator[Metric]:
        """Health by rank, as NVML tells it."""
        names = [*self._names, "gpu"]
        healthy = GaugeMetricFamily(
            "glimmer_gpu_healthy", "0: it needs a reset or a repair", labels=names
        )
        last = GaugeMetricFamily("glimmer_gpu_last_xid", "0: none", labels=names)
        xids = CounterMetricFamily(
            "glimmer_gpu_xid_events", "since the server started", labels=[*names, "kind"]
        )
        ecc = CounterMetricFamily(
            "glimmer_gpu_ecc_errors", "since the driver was loaded", labels=[*names, "kind"]
        )
        for rank, gpu in enumerate(launcher.gpus):
            values = [*self._values, str(rank)]
            healthy.add_metric(values, float(gpu.is_healthy))
            last.add_metric(values, gpu.last_xid)
            xids.add_metric([*values, "fatal"], gpu.fatal_xids)
            xids.add_metric([*values, "application"], gpu.application_xids)
            xids.add_metric([*values, "other"], gpu.other_xids)
            ecc.add_metric([*values, "corrected"], gpu.corrected_ecc)
            ecc.add_metric([*values, "uncorrected"], gpu.uncorrected_ecc)
        yield from (healthy, last, xids, ecc)

    def _steps(self, beat: Heartbeat) -> Iterator[Metric]:
        """LightLLM's metrics of steps: number, duration and rows, by kind."""
        names = [*self._names, "method"]
        count = CounterMetricFamily("lightllm_batch_inference_count", "steps run", labels=names)
        name = "lightllm_batch_inference_duration_bucket"
        duration = HistogramMetricFamily(name, "time of a step, s", labels=names)
        for method, times in (("prefill", beat.prefill_steps), ("decode", beat.decode_steps)):
            values = [*self._values, method]
            count.add_metric(values, sum(times.counts))
            duration.add_metric(values, cumulative(STEP_SECONDS, times.counts), times.total_s)
        yield from (count, duration)
        gaps = beat.token_gaps
        for name, text, bounds, counts, total in (
            (
                "lightllm_batch_next_size",
                "requests in the next batch",
                BATCH_SIZES,
                beat.batch_sizes,
                float(beat.batch_rows),
            ),
            (
                "vllm:iteration_tokens_total",
                "tokens of a step",
                STEP_TOKENS,
                beat.step_tokens,
                float(beat.planned_tokens),
            ),
            (
                "vllm:inter_token_latency_seconds",
                "time between two steps that bring tokens of a sequence, in the engine",
                STEP_SECONDS,
                gaps.counts,
                gaps.total_s,
            ),
        ):
            family = HistogramMetricFamily(name, text, labels=self._names)
            family.add_metric(self._values, cumulative(bounds, counts), total)
            yield family

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
            "messages that could not be decoded",
            beat.malformed_messages + malformed,
        ),
    }


def kv_usage(beat: Heartbeat) -> float:
    """Fraction of the KV pages that requests hold. Pages only in the prefix cache do not count."""
    used = beat.pages_total - beat.pages_free - beat.pages_cached
    return used / max(1, beat.pages_total)
