"""Mistakes are planted in a copy of the chart. Each must be caught by the check that is named."""

import shutil
from pathlib import Path

import pytest
from chart.checks import CHECKOV, CHECKS, checkov
from chart.render import CHART, EVERYTHING, NEEDS_HELM, PROFILES, ChartError, lint, render

pytestmark = NEEDS_HELM

DEPLOYMENT, HELPERS = "templates/deployment.yaml", "templates/_helpers.tpl"
NETWORK, POOL = "templates/networkpolicy.yaml", "templates/inferencepool.yaml"
PROFILE, VALUES = "values-h200-8gpu.yaml", "values.yaml"
MISTAKES = {
    # name: (file, text, text in its place, the check that must catch it)
    "open brace": (DEPLOYMENT, "{{- end }}\n          ports:", "\n          ports:", "helm"),
    "bad indent": (DEPLOYMENT, "      terminationGrace", "     terminationGrace", "helm"),
    "missing value": (DEPLOYMENT, ".Values.ports.http", ".Values.port.http", "helm"),
    "misspelt value": (PROFILE, "replicas: 8", "replica: 8", "helm"),
    "gpus as text": (PROFILE, "gpus: 1", 'gpus: "1"', "helm"),
    "misspelt probe": (DEPLOYMENT, "livenessProbe:", "livenessProb:", "kubernetes"),
    "misspelt grace": (DEPLOYMENT, "terminationGracePeriod", "terminationGrace", "kubernetes"),
    "replicas as text": (DEPLOYMENT, "{{ .Values.replicas }}", '"many"', "kubernetes"),
    "misspelt selector": (POOL, "matchLabels", "matchLabel", "custom_resources"),
    "old picker field": (POOL, "endpointPickerRef", "extensionRef", "custom_resources"),
    "misspelt endpoints": (
        "templates/podmonitor.yaml",
        "podMetricsEndpoints",
        "endpoints",
        "custom_resources",
    ),
    "route without backend": (
        "templates/httproute.yaml",
        "backendRefs",
        "backends",
        "custom_resources",
    ),
    "unknown flag": (HELPERS, "--drain_timeout_s", "--drain_seconds", "flags"),
    "unknown profile flag": (PROFILE, "mtp_mode", "mtp_modes", "flags"),
    "wrong choice": (PROFILE, "eagle_with_att", "eagle", "flags"),
    "one rank on all gpus": (HELPERS, "--tp={{ max 1 (int .Values.gpus) }}", "--tp=2", "flags"),
    "other metrics port": (HELPERS, ".Values.ports.metrics", ".Values.ports.http", "flags"),
    "probe of a missing route": (DEPLOYMENT, "path: /liveness", "path: /live", "probes"),
    "liveness asks readiness": (DEPLOYMENT, "path: /liveness", "path: /readiness", "probes"),
    "probe on the busy port": (
        DEPLOYMENT,
        "{path: /liveness, port: metrics}",
        "{path: /liveness, port: http}",
        "probes",
    ),
    "short grace": (HELPERS, ".drainTimeoutSeconds .slack", ".slack", "times"),
    "no grace": (
        DEPLOYMENT,
        '      terminationGracePeriodSeconds: {{ include "glimmer.graceSeconds" . }}\n',
        "",
        "times",
    ),
    "hasty refusal": (VALUES, "drainDelaySeconds: 15", "drainDelaySeconds: 0", "times"),
    "grace without the delay": (HELPERS, ".preStopSeconds .drainDelaySeconds", "0", "times"),
    "hasty liveness": (VALUES, "failureThreshold: 6", "failureThreshold: 3", "times"),
    "hasty startup": (VALUES, "failureThreshold: 180", "failureThreshold: 18", "times"),
    "service of nothing": (
        "templates/service.yaml",
        "component: server",
        "component: servers",
        "references",
    ),
    "budget of nothing": (
        "templates/poddisruptionbudget.yaml",
        "component: server",
        "component: web",
        "references",
    ),
    "monitor of no port": (
        "templates/podmonitor.yaml",
        "port: metrics",
        "port: prometheus",
        "references",
    ),
    "volume not mounted": (
        DEPLOYMENT,
        "            - {name: shm, mountPath: /dev/shm}\n",
        "",
        "references",
    ),
    "root user": (HELPERS, "runAsUser: 10001", "runAsUser: 0", "security"),
    "may be root": (HELPERS, "runAsNonRoot: true", "runAsNonRoot: false", "security"),
    "writable root": (
        HELPERS,
        "readOnlyRootFilesystem: true",
        "readOnlyRootFilesystem: false",
        "security",
    ),
    "all capabilities": (HELPERS, "  capabilities:\n    drop: [ALL]\n", "", "security"),
    "escalation": (HELPERS, "Escalation: false", "Escalation: true", "security"),
    "no seccomp": (HELPERS, "type: RuntimeDefault", "type: Unconfined", "security"),
    "token": (HELPERS, "ServiceAccountToken: false", "ServiceAccountToken: true", "security"),
    "host network": (HELPERS, "hostNetwork: false", "hostNetwork: true", "security"),
    "writable model": (
        DEPLOYMENT,
        "mountPath: /models, readOnly: true",
        "mountPath: /models",
        "security",
    ),
    "open egress": (NETWORK, "[Ingress, Egress]", "[Ingress]", "security"),
    "open ingress": (
        PROFILE,
        "networkPolicy:",
        "networkPolicy:\n  enabled: false",
        "security",
    ),
}
CHECKOV_FINDS = {
    "root user": "CKV_K8S_40",
    "writable root": "CKV_K8S_22",
    "all capabilities": "CKV_K8S_37",
    "escalation": "CKV_K8S_20",
    "no seccomp": "CKV_K8S_31",
    "token": "CKV_K8S_38",
    "host network": "CKV_K8S_19",
    "misspelt probe": "CKV_K8S_8",
}


def plant(name: str, folder: Path) -> Path:
    """A copy of the chart with that mistake."""
    file, text, wrong, _ = MISTAKES[name]
    chart = folder / name.replace(" ", "-")
    shutil.copytree(CHART, chart)
    before = (chart / file).read_text()
    assert text in before, f"{file} changed: {text}"
    (chart / file).write_text(before.replace(text, wrong))
    return chart


def problems(name: str, chart: Path) -> list[str]:
    """Findings of the check that must catch the mistake."""
    check = MISTAKES[name][3]
    if check == "helm":
        with pytest.raises(ChartError) as refusal:
            lint("h200-8gpu", chart)
        return [str(refusal.value)]
    return CHECKS[check](render("h200-8gpu", chart=chart))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught(name: str, tmp_path: Path) -> None:
    found = problems(name, plant(name, tmp_path))
    print(f"{name}: {MISTAKES[name][3]}: {found}")
    assert found


@pytest.mark.skipif(not CHECKOV.exists(), reason="checkov is missing: make tools")
def test_checkov_finds_security_mistakes_and_nothing_else(tmp_path: Path) -> None:
    (folder := tmp_path / "rendered").mkdir()
    renderings = {profile: render(profile) for profile in PROFILES}
    renderings["everything"] = render("demo-cpu", EVERYTHING)
    wrong = {name: render("h200-8gpu", chart=plant(name, tmp_path)) for name in CHECKOV_FINDS}
    found = checkov(renderings | wrong, folder)
    assert not {name: found[name] for name in renderings if found[name]}
    for name, rule in CHECKOV_FINDS.items():
        assert any(finding.startswith(f"{rule} ") for finding in found[name]), (name, found[name])
