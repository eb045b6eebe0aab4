"""Prints the Grafana dashboard, which is kept in `dashboard.json`. Needs grafana-foundation-sdk."""

import sys
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

_SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
_HERE = '{job="glimmer",instance=~"$instance"}'
_WIDTH, _HEIGHT = 8, 7  # three panels a row


@dataclass(frozen=True)
class Graph:
    """A panel: its title, what it means, the unit, and (legend, query) pairs."""

    title: str
    text: str
    unit: str
    queries: tuple[tuple[str, str], ...]


def _rate(name: str, more: str = "") -> str:
    here = _HERE.replace("}", more + "}")
    return f"rate({name}{here}[$__rate_interval])"


def _quantiles(name: str) -> tuple[tuple[str, str], ...]:
    buckets = f"sum by (le) ({_rate(name + '_bucket')})"
    return tuple(
        (f"p{percent}", f"histogram_quantile({percent / 100:g}, {buckets})")
        for percent in (50, 95, 99)
    )


ROWS = {
    "Overview": (
        Graph(
            "Ready",
            "1: new requests may come",
            "none",
            (("{{instance}}", f"glimmer_ready{_HERE}"),),
        ),
        Graph(
            "Requests",
            "running, waiting and preempted",
            "short",
            (
                ("running", f"sum(vllm:num_requests_running{_HERE})"),
                ("waiting", f"sum(vllm:num_requests_waiting{_HERE})"),
            ),
        ),
        Graph(
            "Tokens per second",
            "prompts as they end, outputs as they are made",
            "short",
            (
                ("output", f"sum({_rate('vllm:generation_tokens_total')})"),
                ("prompt", f"sum({_rate('vllm:prompt_tokens_total')})"),
                ("from the cache", f"sum({_rate('vllm:prompt_tokens_cached_total')})"),
            ),
        ),
    ),
    "Latency": (
        Graph(
            "Time to first token",
            "from arrival",
            "s",
            _quantiles("vllm:time_to_first_token_seconds"),
        ),
        Graph(
            "Between tokens", "in the engine", "s", _quantiles("vllm:inter_token_latency_seconds")
        ),
        Graph("Whole request", "from arrival", "s", _quantiles("vllm:e2e_request_latency_seconds")),
        Graph("Queue", "until the first step", "s", _quantiles("vllm:request_queue_time_seconds")),
        Graph(
            "Prefill", "to the first token", "s", _quantiles("vllm:request_prefill_time_seconds")
        ),
        Graph(
            "Decode", "from the first token", "s", _quantiles("vllm:request_decode_time_seconds")
        ),
    ),
    "Engine": (
        Graph(
            "KV pages in use",
            "of all",
            "percentunit",
            (("{{instance}}", f"vllm:kv_cache_usage_perc{_HERE}"),),
        ),
        Graph(
            "Prefix cache",
            "part of looked-up prompt tokens that was found",
            "percentunit",
            (
                (
                    "hits",
                    f"sum({_rate('vllm:prefix_cache_hits_total')})"
                    f" / sum({_rate('vllm:prefix_cache_queries_total')})",
                ),
            ),
        ),
        Graph(
            "Preemptions",
            "per second",
            "short",
            (("{{instance}}", _rate("vllm:num_preemptions_total")),),
        ),
        Graph("Tokens of a step", "", "short", _quantiles("vllm:iteration_tokens_total")),
        Graph("Steps per second", "", "short", (("{{instance}}", _rate("glimmer_steps_total")),)),
        Graph(
            "Drafts accepted",
            "by position",
            "percentunit",
            (
                (
                    "{{position}}",
                    f"sum by (position) ({_rate('glimmer_drafts_accepted_total')})"
                    f" / sum by (position) ({_rate('glimmer_drafts_total')})",
                ),
            ),
        ),
    ),
    "Trouble": (
        Graph(
            "Rejections",
            "per second, by reason",
            "short",
            (("{{reason}}", f"sum by (reason) ({_rate('glimmer_rejections_total')})"),),
        ),
        Graph(
            "Endings",
            "per second, by reason",
            "short",
            (
                (
                    "{{finished_reason}}",
                    f"sum by (finished_reason) ({_rate('vllm:request_success_total')})",
                ),
            ),
        ),
        Graph(
            "Aborts",
            "per second, by cause",
            "short",
            (("{{cause}}", f"sum by (cause) ({_rate('glimmer_aborted_requests_total')})"),),
        ),
        Graph(
            "Restarts and stalls",
            "since the start",
            "short",
            (
                ("{{unit}} restarts", f"glimmer_restarts_total{_HERE}"),
                ("stalls", f"glimmer_stalls_total{_HERE}"),
            ),
        ),
        Graph(
            "Clients and grammars",
            "per second",
            "short",
            (
                ("slow clients cut", f"sum({_rate('glimmer_slow_clients_cut_total')})"),
                ("grammar time-outs", f"sum({_rate('glimmer_grammar_timeouts_total')})"),
            ),
        ),
        Graph(
            "Lost lines and messages",
            "since the start",
            "short",
            (
                ("lines of {{process}}", f"glimmer_log_lines_dropped_total{_HERE}"),
                ("messages of {{process}}", f"glimmer_messages_dropped_total{_HERE}"),
            ),
        ),
        Graph("GPUs", "1: healthy", "none", (("GPU {{gpu}}", f"glimmer_gpu_healthy{_HERE}"),)),
        Graph(
            "Xid events",
            "since the start",
            "short",
            (("GPU {{gpu}} {{kind}}", f"glimmer_gpu_xid_events_total{_HERE}"),),
        ),
        Graph(
            "ECC errors",
            "since the driver was loaded",
            "short",
            (("GPU {{gpu}} {{kind}}", f"glimmer_gpu_ecc_errors_total{_HERE}"),),
        ),
    ),
}


def _panel(graph: Graph) -> Any:
    kind: Any = stat if graph.title == "Ready" else timeseries
    panel = kind.Panel().title(graph.title).description(graph.text).unit(graph.unit)
    panel = panel.datasource(_SOURCE).height(_HEIGHT).span(_WIDTH)
    for letter, (legend, query) in zip("ABC", graph.queries, strict=False):
        target = prometheus.Dataquery().expr(query).legend_format(legend).ref_id(letter)
        panel = panel.with_target(target)
    return panel


def make() -> str:
    """The dashboard as JSON."""
    board = (
        dashboard.Dashboard("Glimmer")
        .uid("glimmer")
        .tags(["glimmer", "llm"])
        .refresh("30s")
        .time("now-1h", "now")
        .with_variable(
            dashboard.DatasourceVariable("source").type("prometheus").label("Prometheus")
        )
        .with_variable(
            dashboard.QueryVariable("instance")
            .datasource(_SOURCE)
            .query("label_values(glimmer_ready, instance)")
            .multi(True)
            .include_all(True)
        )
    )
    for title, graphs in ROWS.items():
        board = board.with_row(dashboard.Row(title))
        for graph in graphs:
            board = board.with_panel(_panel(graph))
    text: str = JSONEncoder(sort_keys=True, indent=1).encode(board.build())
    return text + "\n"


if __name__ == "__main__":
    sys.stdout.write(make())
