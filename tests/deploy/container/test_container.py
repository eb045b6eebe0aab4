"""The Containerfile, its context and its locks. tests/container/steps.py executes it."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from container.containerfile import FILE, pairs, parse, words
from container.steps import context, inherited
from glimmer.deploy.container import lock
from glimmer.frontend.access.guard import PUBLIC_PATHS
from glimmer.shared.flags import parse_serve_args

ROOT = FILE.parents[2]
STAGES = parse(FILE.read_text(), {})
RUNTIME = inherited(STAGES, "runtime")


def test_the_last_stage_runs_as_nobody_special_and_starts_the_server() -> None:
    assert list(STAGES)[-1] == "runtime"
    assert RUNTIME.last("USER") == "10001:10001"
    assert RUNTIME.last("STOPSIGNAL") == "SIGTERM"
    tini, dashes, program = words(RUNTIME.last("ENTRYPOINT"))
    assert (tini, dashes, Path(program).name) == ("/usr/bin/tini", "--", "glimmer")
    command, model, *flags = words(RUNTIME.last("CMD"))
    assert (command, model) == ("serve", "demo")
    config = parse_serve_args(flags, {})
    check = RUNTIME.last("HEALTHCHECK")
    url = re.search(r"http://127.0.0.1:(\d+)(/\w+)", check)
    assert url
    assert (int(url[1]), url[2] in PUBLIC_PATHS) == (config.metrics_port, True)
    assert RUNTIME.last("EXPOSE").split() == [str(config.port), str(config.metrics_port)]


def test_only_the_environment_leaves_the_build_and_nothing_comes_from_a_url() -> None:
    assert "build" not in {stage.base for stage in STAGES.values()}
    steps = [step for stage in STAGES.values() for step in stage.steps]
    assert not [text for word, text in steps if word == "ADD"]
    assert not [
        text for word, text in steps if re.search(r"curl|wget|git clone|http://(?!127)", text)
    ]
    copied = [text for word, text in RUNTIME.steps if word == "COPY"]
    assert copied == ["--from=build /opt/glimmer /opt/glimmer"]


def test_the_base_and_every_package_are_pinned() -> None:
    assert re.search(r"@sha256:[0-9a-f]{64}$", STAGES["base"].base)
    assert parse(FILE.read_text(), {"BASE": "debian:12-slim"})["base"].base == "debian:12-slim"
    installs = [
        text for _, text in STAGES["build"].steps if "pip install" in text or "install --no" in text
    ]
    for text in installs:
        for part in text.split("&&"):
            if "bin/pip" in part:
                assert "--require-hashes" in part or "--no-index" in part, part
    for file in FILE.parent.glob("requirements-*.txt"):
        comment, *lines = file.read_text().splitlines()
        assert comment == f"# Written by deploy/container/lock.py {file.stem.partition('-')[2]}"
        assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+ --hash=sha256:[0-9a-f]{64}", x) for x in lines)


@pytest.mark.parametrize("flavour", ["cpu", "cuda"])
def test_the_locks_have_the_tested_versions_of_what_is_needed(flavour: str) -> None:
    lines = (FILE.parent / f"requirements-{flavour}.txt").read_text().splitlines()[1:]
    locked = dict(_canonical(line.split()[0]).split("==") for line in lines)
    tested = {
        _canonical(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for name, version in locked.items():
        pins = [pin for pin in tested if pin.startswith(f"{name}==")]
        assert pins in ([], [f"{name}=={version}"]), f"run deploy/container/lock.py {flavour}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {_canonical(re.split(r"[<>=~]", text)[0]) for text in project["dependencies"]}
    assert names <= locked.keys(), f"run deploy/container/lock.py {flavour}"
    assert ("+cpu" in locked["torch"]) == (flavour == "cpu")


def _canonical(requirement: str) -> str:
    name, _, version = requirement.partition("==")
    name = re.sub(r"[-_.]+", "-", name).lower()
    return f"{name}=={version}" if version else name


def test_a_lock_needs_hashes_and_the_right_build() -> None:
    def report(version: str, hashes: dict[str, str]) -> dict[str, Any]:
        metadata = {"name": "torch", "version": version}
        return {
            "install": [
                {"metadata": metadata, "download_info": {"archive_info": {"hashes": hashes}}}
            ]
        }

    good = report("2.13.0+cpu", {"sha256": "ab"})
    assert lock.requirements(good, "cpu").endswith("\ntorch==2.13.0+cpu --hash=sha256:ab\n")
    with pytest.raises(SystemExit, match="is not for cuda"):
        lock.requirements(good, "cuda")
    with pytest.raises(SystemExit, match="no SHA-256 of torch"):
        lock.requirements(report("2.13.0", {}), "cuda")
    with pytest.raises(SystemExit):
        lock.main(["tpu"])


def test_the_context_has_the_source_and_no_more() -> None:
    names = {str(path.relative_to(ROOT)) for path in context(ROOT)}
    assert names >= {
        "pyproject.toml",
        "LICENSE",
        "frontend/app.py",
        "deploy/demo/model/config.json",
    }
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"deploy", "frontend", "kernels", "scheduler", "shared", "workers"}
    assert not [name for name in names if name.startswith(("deploy/demo/training", "deploy/kube"))]


def test_the_environment_is_that_of_the_chart() -> None:
    environment = {"PATH": ""}
    for word, text in RUNTIME.steps:
        if word == "ENV":
            environment |= pairs(text, environment)
    assert environment["HOME"] == "/cache"
    assert environment["TRITON_CACHE_DIR"] == "/cache/triton"
    assert environment["PATH"].startswith("/opt/glimmer/bin:")
