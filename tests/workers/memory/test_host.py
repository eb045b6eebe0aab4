"""Container limits count."""

from pathlib import Path

import pytest
from glimmer.workers.memory import host


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    return tmp_path


def test_without_limits_the_machine_counts(cgroup: Path) -> None:
    cores, memory = host.usable_cores(), host.available_memory()
    assert cores >= 1
    assert memory > 1 << 20
    (cgroup / "cpu.max").write_text("max 100000\n")
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("1\n")
    assert host.usable_cores() == cores
    assert host.available_memory() > 1 << 20


def test_quota_and_limit_cut(cgroup: Path) -> None:
    (cgroup / "cpu.max").write_text("50000 100000\n")
    assert host.usable_cores() == 1
    (cgroup / "memory.max").write_text("1000000\n")
    (cgroup / "memory.current").write_text("400000\n")
    assert host.available_memory() == 600000
    (cgroup / "memory.current").write_text("1400000\n")
    assert host.available_memory() == 0
