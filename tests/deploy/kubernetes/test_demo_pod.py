"""The demo's pod, executed: its command line and environment, its user, its read-only root and its
volumes, in namespaces without a network. Then the question of `helm test`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from chart.render import NEEDS_HELM, ROOT, Object, one, render, server
from container.sandbox import MISSING, Container, Sandbox

pytestmark = [
    NEEDS_HELM,
    pytest.mark.skipif(bool(MISSING), reason=MISSING or "-"),
    pytest.mark.xdist_group("servers"),
]
USER = 10001
GLIMMER = (sys.executable, "-P", "-m", "glimmer")  # in the place of the image's entry point
GET = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).status)"


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return render("demo-cpu")


@pytest.fixture(scope="module")
def pod(objects: list[Object]) -> Iterator[Container]:
    spec = one(objects, "Deployment")["spec"]["template"]["spec"]
    container = server(objects)
    sizes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"]}
    writable = {m["mountPath"]: _bytes(sizes[m["name"]]) for m in container["volumeMounts"]}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    shown = sorted({ROOT, Path(sys.prefix), Path(sys.base_prefix), *_packages()})
    binds = dict(zip(shown, shown, strict=True))
    sandbox = Sandbox(Path("/"), binds, environment | {"PATH": "/usr/bin:/bin"})
    started = sandbox.start([*GLIMMER, *container["args"]], USER, writable)
    try:
        started.wait_until(*_probe(container, "startupProbe"), timeout_s=120)
        yield started
    finally:
        started.kill()


def _packages() -> set[Path]:
    """Directories outside of the environment from which this Python imports."""
    return {Path(entry).resolve() for entry in sys.path if Path(entry).is_dir()}


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) << {"Ki": 10, "Mi": 20, "Gi": 30}[quantity[-2:]]


def _probe(container: Object, name: str) -> tuple[str, ...]:
    (port,) = [p["containerPort"] for p in container["ports"] if p["name"] == "metrics"]
    url = f"http://127.0.0.1:{port}{container[name]['httpGet']['path']}"
    return (sys.executable, "-c", GET, url)


def test_the_pod_answers_its_probes_and_the_question_of_helm_test(
    pod: Container, objects: list[Object]
) -> None:
    for name in ("livenessProbe", "readinessProbe"):
        assert pod.enter(*_probe(server(objects), name)).stdout == "200\n"
    (asking,) = one(objects, "Pod")["spec"]["containers"]
    words = [word.replace("//glimmer:", "//127.0.0.1:") for word in asking["args"]]
    answer = pod.enter(*GLIMMER, *words)
    assert answer.returncode == 0, answer.stderr
    assert "> Who are you?" in answer.stdout
    assert "Glimmer" in answer.stdout
    print(answer.stdout)


def test_no_process_is_root_and_only_the_volumes_can_be_written(pod: Container) -> None:
    processes = [pod.first, *pod.first.children(recursive=True)]
    assert len(processes) >= 5
    for process in processes:
        assert set(process.uids()) == {USER}
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "CapEff:\t0000000000000000\n" in status
        assert "NoNewPrivs:\t1\n" in status
    for path in ("/etc/x", "/usr/x", "/x", str(ROOT / "x")):
        assert pod.enter("touch", path).returncode
    for path in ("/tmp/x", "/cache/x", "/run/glimmer/x", "/dev/shm/x"):
        assert pod.enter("touch", path).returncode == 0


def test_it_ends_within_its_grace_period(pod: Container, objects: list[Object]) -> None:
    spec = one(objects, "Deployment")["spec"]["template"]["spec"]
    children = pod.first.children(recursive=True)
    assert pod.stop(spec["terminationGracePeriodSeconds"]) == 0
    assert not [child for child in children if psutil.pid_exists(child.pid)]
