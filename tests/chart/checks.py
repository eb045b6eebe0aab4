"""What must hold for rendered objects. Each check returns the problems that it finds, as texts.

`checkov` is apart, because one run of it takes seconds: it gets many renderings at once.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from chart.render import Object, one, pods, server
from glimmer.deploy.launcher import supervisor
from glimmer.frontend.access.guard import PUBLIC_PATHS
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import StartError
from glimmer.shared.flags import parse_serve_args

VERSIONS = ("1.31", "1.34", "1.37")
_CRDS = Path(__file__).with_name("crds")
CHECKOV = Path(sys.executable).parents[1] / "checkov" / "bin" / "checkov"
# Seconds that a server needs after its drain to end its streams and processes.
STOP_S = 20
# Seconds in which routers notice that a pod ends.
ROUTERS_S = 15
# Findings of checkov that are no mistakes here: rule and kind of object (None: all).
SKIPPED: dict[tuple[str, str | None], str] = {
    ("CKV_K8S_15", None): "pullPolicy Always would need a registry at each start; use a digest",
    ("CKV_K8S_43", None): "the digest is the user's: image.digest",
    ("CKV_K8S_8", "Pod"): "the pod that asks one question ends by itself",
    ("CKV_K8S_9", "Pod"): "nothing connects to the pod that asks one question",
}


def kubernetes(objects: list[Object]) -> list[str]:
    """The schemas of several versions of Kubernetes, with unknown fields refused."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="make tools")
    problems = []
    for version in VERSIONS:
        for an_object in objects:
            if an_object["apiVersion"] in own_kinds():
                continue
            try:
                kubernetes_validate.validate(an_object, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                path = ".".join(str(part) for part in error.path)
                problems.append(f"{version} {an_object['kind']} {path}: {error.message}")
    return problems


@cache
def own_kinds() -> dict[str, Any]:
    """Validators of objects that Kubernetes does not know itself, by API version."""
    schemas = [json.loads(path.read_text()) for path in sorted(_CRDS.glob("*.json"))]
    return {
        schema["properties"]["apiVersion"]["const"]: jsonschema_rs.validator_for(schema)
        for schema in schemas
    }


def custom_resources(objects: list[Object]) -> list[str]:
    """Schemas of PodMonitor, ScaledObject, HTTPRoute and InferencePool."""
    problems = []
    for an_object in objects:
        validator = own_kinds().get(an_object["apiVersion"])
        for error in validator.iter_errors(an_object) if validator else ():
            path = ".".join(str(part) for part in error.instance_path)
            problems.append(f"{an_object['kind']} {path}: {error.message}")
    return problems


def settings(objects: list[Object]) -> ServeConfig:
    """The configuration that the pod's command line means. Raises StartError."""
    command, *flags = server(objects)["args"]
    assert command == "serve"
    return parse_serve_args(flags, {})


def flags(objects: list[Object]) -> list[str]:
    """The parser of `glimmer serve`, and that values agree with the rest of the pod."""
    try:
        config = settings(objects)
    except StartError as error:
        return [str(error)]
    container = server(objects)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    gpus = sum(v for k, v in container["resources"]["limits"].items() if k.endswith("/gpu"))
    expected = {
        "port": (config.port, ports.get("http")),
        "metrics_port": (config.metrics_port, ports.get("metrics")),
        "tp": (config.tp, max(1, gpus)),
        "device": (config.device, "cuda" if gpus else "cpu"),
    }
    return [f"--{name}: {a} and {b}" for name, (a, b) in expected.items() if a != b]


def probes(objects: list[Object]) -> list[str]:
    """Probes ask routes that exist and need no key, on the port that answers at all times."""
    container = server(objects)
    problems = []
    for name, path in (
        ("startupProbe", "/readiness"),
        ("livenessProbe", "/liveness"),
        ("readinessProbe", "/readiness"),
    ):
        request = container.get(name, {}).get("httpGet", {})
        if request.get("path") != path or path not in PUBLIC_PATHS:
            problems.append(f"{name}: asks {request.get('path')}")
        if request.get("port") != "metrics":
            problems.append(f"{name}: port {request.get('port')}")
    return problems


def times(objects: list[Object]) -> list[str]:
    """A pod is not killed while it drains, loads or replaces a process itself."""
    spec = one(objects, "Deployment")["spec"]["template"]["spec"]
    container = server(objects)
    pre_stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    config = settings(objects)
    delay = pre_stop + config.drain_delay_s
    needed = delay + config.drain_timeout_s + STOP_S
    grace = spec.get("terminationGracePeriodSeconds", 30)
    problems = []
    if grace <= needed:
        problems.append(f"terminationGracePeriodSeconds {grace}: needs more than {needed:.0f}")
    if delay < ROUTERS_S:
        problems.append(f"{delay:.0f} s until requests are refused: routers need {ROUTERS_S}")
    startup = _patience_s(container.get("startupProbe", {}))
    if startup < config.start_timeout_s:
        problems.append(f"startupProbe ends loading after {startup} s")
    liveness = _patience_s(container.get("livenessProbe", {}))
    if liveness <= supervisor.FRONTEND_LIMIT_S + supervisor.HEARTBEAT_LIMIT_S:
        problems.append(f"livenessProbe acts after {liveness} s, before the launcher")
    return problems


def _patience_s(probe: Object) -> int:
    return int(probe.get("periodSeconds", 10)) * int(probe.get("failureThreshold", 3))


def references(objects: list[Object]) -> list[str]:
    """Names that objects use exist, and selectors find the server's pods."""
    deployment = one(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    problems = []
    for kind, selector in _selectors(objects):
        if selector.get("app.kubernetes.io/component") == "test":
            continue
        if not selector.items() <= labels.items():
            problems.append(f"{kind} selects {selector}")
    for pod in pods(objects):
        spec = pod["spec"]
        (container,) = spec["containers"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        volumes = {volume["name"] for volume in spec.get("volumes", ())}
        if mounted != volumes:
            problems.append(f"volumes {volumes}, mounted {mounted}")
        account = one(objects, "ServiceAccount")["metadata"]["name"]
        if spec["serviceAccountName"] != account:
            problems.append(f"serviceAccountName {spec['serviceAccountName']}")
    ports = {port["name"] for port in server(objects)["ports"]}
    used = {str(port["targetPort"]) for port in one(objects, "Service")["spec"]["ports"]}
    for monitor in (o for o in objects if o["kind"] == "PodMonitor"):
        used |= {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    if not used <= ports:
        problems.append(f"ports {used - ports}")
    return problems


def _selectors(objects: list[Object]) -> Iterator[tuple[str, dict[str, str]]]:
    for an_object in objects:
        spec = an_object.get("spec", {})
        for name in ("selector", "podSelector"):
            if name in spec:
                yield an_object["kind"], spec[name].get("matchLabels", spec[name])


def security(objects: list[Object]) -> list[str]:
    """No root, no rights, no token, no writable image, and a network that lets out nothing."""
    problems = [problem for pod in pods(objects) for problem in _pod_security(pod["spec"])]
    policies = [
        o["spec"]
        for o in objects
        if o["kind"] == "NetworkPolicy"
        and o["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "server"
    ]
    for policy in policies:
        if policy["egress"] or set(policy["policyTypes"]) != {"Ingress", "Egress"}:
            problems.append(f"egress {policy['egress']}")
        if any(not rule.get("from") for rule in policy["ingress"]):
            problems.append("ingress from everywhere")
    return problems if policies else [*problems, "no NetworkPolicy"]


def _pod_security(spec: Object) -> Iterator[str]:
    (container,) = spec["containers"]
    own = container.get("securityContext", {})
    both = spec.get("securityContext", {}) | own
    writable = {"shm", "tmp", "run", "cache"}
    rules = {
        "root": both.get("runAsNonRoot") is True and both.get("runAsUser", 0) > 10000,
        "seccomp": both.get("seccompProfile") == {"type": "RuntimeDefault"},
        "rights": own.get("capabilities") == {"drop": ["ALL"]},
        "escalation": own.get("allowPrivilegeEscalation") is False,
        "writable image": own.get("readOnlyRootFilesystem") is True,
        "token": spec.get("automountServiceAccountToken") is False,
        "links": spec.get("enableServiceLinks") is False,
        "host": not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
        "key in the environment": "KEY" not in json.dumps(container.get("env", ())),
        "writable volume": all(
            mount.get("readOnly") or mount["name"] in writable
            for mount in container.get("volumeMounts", ())
        ),
        "endless volume": all(
            volume["emptyDir"].get("sizeLimit")
            for volume in spec.get("volumes", ())
            if "emptyDir" in volume
        ),
    }
    yield from (name for name, holds in rules.items() if not holds)


CHECKS: dict[str, Callable[[list[Object]], list[str]]] = {
    check.__name__: check
    for check in (
        kubernetes,
        custom_resources,
        flags,
        probes,
        times,
        references,
        security,
    )
}


def checkov(renderings: dict[str, list[Object]], folder: Path) -> dict[str, set[str]]:
    """Failed rules of each rendering, without those in SKIPPED."""
    for name, objects in renderings.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(objects))
    command = [str(CHECKOV), "--directory", str(folder), "--framework", "kubernetes"]
    command += ["--skip-download", "--quiet", "--compact", "--soft-fail"]
    command += ["--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 50 * len(renderings)
    failed: dict[str, set[str]] = {name: set() for name in renderings}
    for finding in report["results"]["failed_checks"]:
        rule, resource = finding["check_id"], finding["resource"]
        if not SKIPPED.keys() & {(rule, None), (rule, resource.partition(".")[0])}:
            failed[Path(finding["file_path"]).stem].add(f"{rule} {resource}")
    return failed
