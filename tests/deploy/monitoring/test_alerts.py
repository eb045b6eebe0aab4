"""Each alert fires when it should, is silent when it should be, and says what to do."""

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from glimmer.frontend.engine.client import EngineClient
from glimmer.frontend.engine.metrics import Metrics
from glimmer.frontend.grammar.checker import GrammarChecker
from glimmer.frontend.wire.connection import Connections
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import GpuState, Heartbeat, Hello, LauncherBeat
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "monitoring"
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
BY_NAME = {rule["alert"]: rule for rule in RULES}
HERE = 'job="glimmer",instance="h:1"'
TTFT = "vllm:time_to_first_token_seconds"
MODEL = ',model_name="m"'
# Alert -> (series that make it fire, series that do not, labels that the series give it).
# Values are one a minute, in promtool's notation; all are looked at after 8 hours.
ALWAYS: dict[str, tuple[dict[str, str], dict[str, str], dict[str, str]]] = {
    "NoProgress": (
        {"vllm:num_requests_running|": "3x500", "glimmer_steps_total|": "7x500"},
        {"vllm:num_requests_running|": "3x500", "glimmer_steps_total|": "0+90x500"},
        {"model_name": "m"},
    ),
    "EngineDown": ({"glimmer_ready|": "0x500"}, {"glimmer_ready|": "1x500"}, {"model_name": "m"}),
    "QueueGrowing": (
        {"vllm:num_requests_waiting|": "11+1x500"},
        {"vllm:num_requests_waiting|": "400x500"},
        {"model_name": "m"},
    ),
    "TtftBurnFast": (
        {f'{TTFT}_bucket|le="2.5"': "0+1x500", f"{TTFT}_count|": "0+10x500"},
        {f'{TTFT}_bucket|le="2.5"': "0+9x500", f"{TTFT}_count|": "0+10x500"},
        {},
    ),
    "TtftBurnSlow": (
        {f'{TTFT}_bucket|le="2.5"': "0+6x500", f"{TTFT}_count|": "0+10x500"},
        {f'{TTFT}_bucket|le="2.5"': "0+9x500", f"{TTFT}_count|": "0+10x500"},
        {},
    ),
    "KVNearFull": (
        {"vllm:kv_cache_usage_perc|": "0.97x500"},
        {"vllm:kv_cache_usage_perc|": "0.9x500"},
        {"model_name": "m"},
    ),
    "PreemptionStorm": (
        {"vllm:num_preemptions_total|": "0+60x500"},
        {"vllm:num_preemptions_total|": "0+6x500"},
        {"model_name": "m"},
    ),
    "Rejections": (
        {
            'glimmer_rejections_total|reason="overloaded"': "0+10x500",
            "lightllm_request_count_total|": "0+100x500",
        },
        {
            'glimmer_rejections_total|reason="invalid"': "0+90x500",
            "lightllm_request_count_total|": "0+100x500",
        },
        {},
    ),
    "RestartLoop": (
        {'glimmer_restarts_total|unit="engine"': "0+1x500"},
        {'glimmer_restarts_total|unit="engine"': "0+0x470 2x30"},
        {"model_name": "m", "unit": "engine"},
    ),
    "GrammarTimeouts": (
        {"glimmer_grammar_timeouts_total|": "0+3x500"},
        {"glimmer_grammar_timeouts_total|": "0+1x500"},
        {"model_name": "m"},
    ),
    "AbortSpike": (
        {
            'glimmer_aborted_requests_total|cause="disconnect"': "0+50x500",
            "lightllm_request_count_total|": "0+100x500",
        },
        {
            'glimmer_aborted_requests_total|cause="disconnect"': "0+20x500",
            "lightllm_request_count_total|": "0+100x500",
        },
        {"model_name": "m", "cause": "disconnect"},
    ),
    "DroppedLogs": (
        {'glimmer_log_lines_dropped_total|process="worker"': "0+1x500"},
        {'glimmer_log_lines_dropped_total|process="worker"': "9x500"},
        {"model_name": "m", "process": "worker"},
    ),
    "GpuFault": (
        {'glimmer_gpu_healthy|gpu="3"': "0x500"},
        {'glimmer_gpu_xid_events_total|gpu="3",kind="application"': "0+1x500"},
        {"model_name": "m", "gpu": "3"},
    ),
}


def series(values: dict[str, str]) -> list[dict[str, str]]:
    found = []
    for key, numbers in values.items():
        name, _, labels = key.partition("|")
        labels = ",".join(filter(None, [HERE + MODEL, labels]))
        found.append({"series": f"{name}{{{labels}}}", "values": numbers})
    return found


def expectation(alert: str, labels: dict[str, str]) -> dict[str, Any]:
    rule = BY_NAME[alert]
    labels = {"job": "glimmer", "instance": "h:1", **labels}
    notes = {
        name: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: labels[match[1]], text)
        for name, text in rule["annotations"].items()
    }
    return {"exp_labels": {**rule["labels"], **labels}, "exp_annotations": notes}


def test_every_alert_has_a_case_here() -> None:
    assert list(ALWAYS) == list(BY_NAME)


def test_alerts_fire_and_are_silent_when_they_should(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: make tools")
    tests = []
    for alert, (loud, quiet, labels) in ALWAYS.items():
        for values, expected in ((loud, [expectation(alert, labels)]), (quiet, [])):
            check = {"eval_time": "8h", "alertname": alert, "exp_alerts": expected}
            tests.append(
                {"interval": "1m", "input_series": series(values), "alert_rule_test": [check]}
            )
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(FOLDER / "alerts.yaml")], "tests": tests}))
    for command in (("check", "rules", str(FOLDER / "alerts.yaml")), ("test", "rules", str(file))):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


async def known_names(tmp_path: Path) -> set[str]:
    """Names of all samples that /metrics can have."""
    config = ServeConfig()
    client = EngineClient(str(tmp_path), 0, Hello("frontend", 0, 1, ""))
    link = asyncio.create_task(client.run())
    await asyncio.sleep(0)
    client.state.heartbeat = Heartbeat(
        *(0, 0, 0, 0, 1, 1, 0, True, 0, 0, 0, 0, 0), drafts_offered=[1], drafts_accepted=[1]
    )
    client.state.launcher = LauncherBeat(gpus=[GpuState("GPU-0")])
    metrics = Metrics(config, 100, client)
    metrics.follow(Connections(1), GrammarChecker(config, 10, {}))
    metrics.follow_traces(lambda: 0)
    families = text_string_to_metric_families(metrics.render().decode())
    link.cancel()
    await asyncio.gather(link, return_exceptions=True)
    return {sample.name for family in families for sample in family.samples} | {"up"}


def names_in(query: str) -> set[str]:
    """Names of metrics in a query: words before a { or [, or alone."""
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]|\{[^}]*\}', "", query)
    bare = re.sub(r"\b(by|ignoring|on)\s*\([^)]*\)", "", bare)
    words = set(re.findall(r"[a-z_:][a-z0-9_:]*(?!\()\b", bare))
    functions = set(re.findall(r"([a-z_]+)\s*\(", bare))
    return words - functions - {"and", "or", "sum", "by", "le", "ignoring"}


async def test_every_metric_of_a_rule_or_panel_exists(tmp_path: Path) -> None:
    known = await known_names(tmp_path)
    queries = [rule["expr"] for rule in RULES]
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    targets = [target for panel in panels for target in panel.get("targets", [])]
    assert len(targets) > 30
    for query in (*queries, *(target["expr"] for target in targets)):
        assert names_in(query), query
        assert names_in(query) <= known, query


def test_every_alert_says_what_to_do() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    anchors = {title.lower() for title in re.findall(r"^#+ (\w+)$", page, re.M)}
    for rule in RULES:
        assert rule["annotations"]["runbook_url"].rpartition("#")[2] in anchors, rule["alert"]
        assert rule["annotations"]["summary"]


def test_the_dashboard_is_current_and_its_panels_do_not_overlap() -> None:
    text = (FOLDER / "dashboard.json").read_text()
    places: set[tuple[int, int]] = set()
    for panel in json.loads(text)["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert all(x < 24 for x, _ in cells), panel["title"]
        assert not places & cells, panel["title"]
        places |= cells
    pytest.importorskip("grafana_foundation_sdk")
    from glimmer.deploy.monitoring.dashboard import make

    assert make() == text, "run: python deploy/monitoring/dashboard.py > .../dashboard.json"


def test_prometheus_and_grafana_find_their_files() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service["volumes"]:
            assert (FOLDER / volume.split(":")[0]).exists(), volume
    scraped = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert scraped["scrape_configs"][0]["job_name"] == "glimmer"
    if shutil.which("promtool") is not None:
        command = ["promtool", "check", "config", str(FOLDER / "prometheus.yml")]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
