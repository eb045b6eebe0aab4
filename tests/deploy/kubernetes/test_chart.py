"""The Helm chart: each profile renders objects that hold every check, and wrong values are
refused with a message that names them."""

from typing import Any

import pytest
import yaml
from chart.checks import CHECKS, own_kinds, settings
from chart.render import (
    CHART,
    EVERYTHING,
    NEEDS_HELM,
    PROFILES,
    ROOT,
    ChartError,
    changed,
    lint,
    one,
    render,
    server,
)
from glimmer import __version__

pytestmark = NEEDS_HELM

CASES = [*((profile, "{}") for profile in PROFILES), ("demo-cpu", EVERYTHING)]
NAMES = [*PROFILES, "everything"]


def test_there_are_four_profiles_and_the_version_is_that_of_the_server() -> None:
    assert PROFILES == ("demo-cpu", "h100-1gpu", "h200-1gpu", "h200-8gpu")
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


@pytest.mark.parametrize("profile", PROFILES)
def test_lint_finds_nothing(profile: str) -> None:
    assert "1 chart(s) linted, 0 chart(s) failed" in lint(profile)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("profile", "values"), CASES, ids=NAMES)
def test_rendered_objects_hold(profile: str, values: str, check: str) -> None:
    assert CHECKS[check](render(profile, values)) == []


def test_all_parts_are_rendered_and_every_custom_resource_has_a_schema() -> None:
    kinds = {(o["kind"], o["apiVersion"]) for o in render("demo-cpu", EVERYTHING)}
    assert {kind for kind, _ in kinds} == {
        "Deployment",
        "HTTPRoute",
        "InferencePool",
        "NetworkPolicy",
        "Pod",
        "PodDisruptionBudget",
        "PodMonitor",
        "ScaledObject",
        "Service",
        "ServiceAccount",
    }
    assert {version for _, version in kinds} >= own_kinds().keys()


def test_gpus_are_ranks_and_a_node_with_eight_has_eight_servers() -> None:
    assert settings(render("demo-cpu", EVERYTHING)).tp == 4
    objects = render("h200-8gpu")
    assert one(objects, "Deployment")["spec"]["replicas"] == 8
    assert server(objects)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert settings(objects).tp == 1


def test_flags_reach_the_server_as_they_are() -> None:
    config = settings(render("demo-cpu", EVERYTHING))
    assert config.max_queued_tokens == 32_000_000
    assert config.check_model_name
    assert config.mem_fraction == 0.5
    assert config.api_key_file == "/etc/glimmer/keys/keys"
    many = {"mtp_hidden_states": ["after_norm", "before_norm"], "use_tgi_api": False}
    config = settings(render("demo-cpu", changed(flags=many)))
    assert config.mtp_hidden_states == ("after_norm", "before_norm")
    assert not config.use_tgi_api


@pytest.mark.parametrize(("pre_stop", "delay"), [(0, 15), (60, 0), (5, 20)])
@pytest.mark.parametrize("drain", [0, 300, 7200])
def test_the_grace_period_follows_from_its_parts(drain: int, pre_stop: int, delay: int) -> None:
    parts = {"preStopSeconds": pre_stop, "drainDelaySeconds": delay, "slackSeconds": 25}
    objects = render("demo-cpu", changed(termination=parts | {"drainTimeoutSeconds": drain}))
    spec = one(objects, "Deployment")["spec"]
    whole = pre_stop + delay + drain + 25
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == whole
    assert spec["progressDeadlineSeconds"] > 1800 + whole
    assert ("lifecycle" in server(objects)) == (pre_stop > 0)
    assert CHECKS["times"](objects) == []


def test_keda_owns_the_number_of_replicas_and_asks_for_a_metric_that_exists() -> None:
    objects = render("h100-1gpu")
    assert "replicas" not in one(objects, "Deployment")["spec"]
    (trigger,) = one(objects, "ScaledObject")["spec"]["triggers"]
    name = trigger["metadata"]["query"].partition("(")[2].partition("{")[0]
    sources = [path.read_text() for path in (ROOT / "frontend" / "engine").glob("*.py")]
    assert any(f'"{name}"' in source for source in sources)
    assert 'namespace="llm",pod=~"glimmer-.*"' in trigger["metadata"]["query"]
    assert "replicas" in one(render("h200-1gpu"), "Deployment")["spec"]


def test_nobody_may_connect_who_is_not_named() -> None:
    closed = changed(networkPolicy={"clients": [], "monitoring": []}, test={"enabled": False})
    policy = one(render("h200-1gpu", closed), "NetworkPolicy")["spec"]
    assert (policy["ingress"], policy["egress"]) == ([], [])


def test_an_image_is_named_by_its_digest_if_there_is_one() -> None:
    assert server(render("demo-cpu"))["image"] == f"glimmer:{__version__}"
    assert server(render("demo-cpu", EVERYTHING))["image"] == "glimmer@sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu": 1}, "additional properties 'gpu' not allowed"),
        ({"gpus": "one"}, "at '/gpus': got string, want integer"),
        ({"gpus": -1}, "at '/gpus': minimum: got -1, want 0"),
        ({"model": {"source": "pvc"}}, "at '/model/pvc/claimName'"),
        ({"model": {"source": "ftp"}}, "at '/model/source': value must be one of"),
        ({"model": {"source": "hostPath"}}, "at '/model/hostPath/path'"),
        ({"cache": {"source": "pvc"}}, "at '/cache/pvc/claimName'"),
        ({"termination": {"slackSeconds": 3}}, "slackSeconds': minimum: got 3, want 20"),
        ({"termination": {"gracePeriodSeconds": 3}}, "'gracePeriodSeconds' not allowed"),
        ({"image": {"digest": "latest"}}, "at '/image/digest'"),
        ({"ports": {"http": 80}}, "at '/ports/http': minimum: got 80"),
        ({"strategy": {"maxSurge": 0, "maxUnavailable": 0}}, "at '/strategy/maxUnavailable'"),
        ({"keda": {"enabled": True}}, "at '/keda/prometheus'"),
        ({"httpRoute": {"enabled": True}}, "at '/httpRoute/parentRefs'"),
        ({"inferencePool": {"enabled": True}}, "at '/inferencePool/endpointPicker/name'"),
        ({"networkPolicy": {"clients": [{"pods": {}}]}}, "additional properties 'pods'"),
        ({"networkPolicy": {"clients": [{}]}}, "minProperties"),
        ({"flags": {"max-len": 1}}, "at '/flags': additional properties 'max-len'"),
        ({"flags": {"mtp": None, "x": {}}}, "at '/flags/x'"),
        ({"flags": {"tp": 2}}, "flags.tp: the chart sets this flag; use gpus"),
        ({"flags": {"api_key": "secret"}}, "flags.api_key: the chart sets this flag; use apiKeys"),
        ({"apiKeys": {"secretName": "k"}}, "set test.apiKey.secretName, or test.enabled=false"),
        (
            {"keda": {"enabled": True, "prometheus": "http://p", "minReplicas": 9}},
            "keda.minReplicas is larger than keda.maxReplicas",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ChartError) as refusal:
        render("demo-cpu", changed(**values))
    assert message in str(refusal.value)


def test_the_values_file_has_every_value_of_the_schema() -> None:
    """A value that is only in the schema would be undocumented."""
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    documented = schema["properties"].keys() - {"global"}
    assert documented == values.keys()
