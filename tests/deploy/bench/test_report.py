"""Every report says which GPU, versions and commit its numbers are of."""

import json
import subprocess
from pathlib import Path

import pytest
from glimmer import __version__
from glimmer.deploy.bench.report import commit, environment, gpus, report, write_report


@pytest.fixture
def driver_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi of our own, the only program there is."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "nvidia-smi"


def test_gpus_are_those_that_the_driver_lists(driver_tool: Path) -> None:
    lines = "NVIDIA H100 80GB HBM3, 81559, 580.159.04\\nNVIDIA H200, [N/A], 580.159.04"
    driver_tool.write_text(f"#!/bin/sh\nprintf '{lines}\\n'\n")
    driver_tool.chmod(0o755)
    first, second = gpus()
    assert first == {
        "name": "NVIDIA H100 80GB HBM3",
        "memory_mib": 81559,
        "driver": "580.159.04",
    }
    assert second["memory_mib"] is None
    found = environment()
    assert (found["device"], found["driver"]) == ("NVIDIA H100 80GB HBM3", "580.159.04")


@pytest.mark.parametrize("script", [None, "exit 9", "printf 'No devices were found\\n'"])
def test_without_a_gpu_the_device_is_the_cpu(driver_tool: Path, script: str | None) -> None:
    if script is not None:
        driver_tool.write_text(f"#!/bin/sh\n{script}\n")
        driver_tool.chmod(0o755)
    found = environment()
    assert (found["device"], found["gpus"], found["driver"]) == ("CPU", [], None)
    assert found["glimmer"] == __version__
    assert found["versions"]["aiohttp"]
    assert "torch" in found["versions"]


def test_the_commit_is_gits_and_says_when_files_differ(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        command = ("git", "-C", str(tmp_path), *identity, *words)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "-m", "x")
    head = git("rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("b")
    assert commit(tmp_path) == f"{head}-dirty"
    package = tmp_path / "site-packages" / "glimmer"
    package.mkdir(parents=True)
    assert commit(package) is None  # not the commit of the checkout around it


def test_a_wheel_knows_the_commit_it_was_built_from(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    (tmp_path / "commit.txt").write_text("abc\n")
    assert commit(tmp_path) == "abc"


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    whole = report("serve", ["--extra_body", '{"a": 1}'], {"seed": 1}, [2], server=None)
    write_report(path, whole)
    assert json.loads(path.read_text()) == whole
    assert whole["command"] == """glimmer bench serve --extra_body '{"a": 1}'"""
    assert list(tmp_path.iterdir()) == [path]
