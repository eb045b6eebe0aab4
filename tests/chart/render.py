"""Renders the Helm chart. Tests that use it are skipped where helm is missing."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "kubernetes"
PROFILES = tuple(sorted(path.stem.removeprefix("values-") for path in CHART.glob("values-*.yaml")))
HELM = shutil.which("helm", path=f"{Path(sys.executable).parent}:{os.defpath}:/usr/local/bin")
NEEDS_HELM = pytest.mark.skipif(HELM is None, reason="helm is missing: make tools")

Object = dict[str, Any]


class ChartError(Exception):
    """What helm says about values or templates that are wrong."""


@cache
def render(profile: str, values: str = "{}", chart: Path = CHART) -> list[Object]:
    """The objects of a profile with other `values`, in JSON. Raises ChartError."""
    text = helm("template", "glimmer", *_flags(profile), "--namespace=llm", values=values, at=chart)
    return [document for document in yaml.safe_load_all(text) if document]


def lint(profile: str, chart: Path = CHART) -> str:
    """The output of `helm lint --strict`. Raises ChartError."""
    return helm("lint", "--strict", *_flags(profile), at=chart)


def helm(*words: str, values: str = "{}", at: Path) -> str:
    """Run helm on the chart `at`. Returns its output. Raises ChartError."""
    assert HELM is not None
    done = subprocess.run(
        [HELM, *words, "--values=-", str(at)],
        cwd=at,
        input=values,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode:
        raise ChartError(done.stdout + done.stderr)
    return done.stdout


def changed(**values: Any) -> str:
    """Values for `render`."""
    return json.dumps(values)


# Values that turn on every part of the chart.
EVERYTHING = changed(
    apiKeys={"secretName": "keys"},
    test={"apiKey": {"secretName": "key", "key": "plain"}},
    podMonitor={"enabled": True, "labels": {"release": "prometheus"}},
    keda={"enabled": True, "prometheus": "http://prometheus.monitoring:9090"},
    httpRoute={"enabled": True, "parentRefs": [{"name": "gate"}], "hostnames": ["llm.example.com"]},
    inferencePool={"enabled": True, "endpointPicker": {"name": "picker"}},
    image={"digest": "sha256:" + "0" * 64, "pullSecrets": ["registry"]},
    model={"source": "image", "image": {"reference": "registry.example.com/model:1"}},
    cache={"source": "pvc", "pvc": {"claimName": "cache"}},
    gpus=4,
    gpuProducts=["NVIDIA-H200", "NVIDIA-H100-80GB-HBM3"],
    priorityClassName="serving",
    runtimeClassName="nvidia",
    nodeSelector={"pool": "gpu"},
    podLabels={"llm-d.ai/role": "both"},
    podAnnotations={"note": "1"},
    env=[{"name": "NCCL_DEBUG", "value": "WARN"}],
    flags={"max_queued_tokens": 32000000, "check_model_name": True, "mem_fraction": 0.5},
)


def one(objects: list[Object], kind: str) -> Object:
    """The only object of a kind."""
    (found,) = [o for o in objects if o["kind"] == kind]
    return found


def pods(objects: list[Object]) -> list[Object]:
    """Metadata and spec of the server's pod and of the test's."""
    return [one(objects, "Deployment")["spec"]["template"], *[o for o in objects if is_pod(o)]]


def is_pod(an_object: Object) -> bool:
    return bool(an_object["kind"] == "Pod")


def server(objects: list[Object]) -> Object:
    """The container that runs the server."""
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def _flags(profile: str) -> list[str]:
    return [f"--values=values-{profile}.yaml", "--kube-version=1.35"]
