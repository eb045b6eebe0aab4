"""The configuration object, and what of the environment is in none."""

import dataclasses
from pathlib import Path

import pytest
from glimmer.shared.config import ServeConfig, child_environment, monitor_credentials


def test_credentials_for_the_push_gateway_are_in_no_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("USERNAME", "ann")
    monkeypatch.setenv("PASSWORD", "hush")
    assert monitor_credentials() == ("ann", "hush")
    assert "hush" not in str(ServeConfig(enable_monitor_auth=True))


def test_a_config_survives_the_way_to_a_child(tmp_path: Path) -> None:
    config = ServeConfig(eos_id=(1, 2), drain_timeout_s=5.0, mtp_draft_model_dir=("a",))
    config.save(tmp_path / "config.json")
    loaded = ServeConfig.load(tmp_path / "config.json")
    assert loaded == config
    assert loaded.config_hash() == config.config_hash()
    assert dataclasses.replace(loaded, port=1).config_hash() != config.config_hash()
    assert (tmp_path / "config.json").stat().st_mode & 0o077 == 0


def test_children_inherit_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    environ = child_environment("worker", threads=2)
    assert environ["OMP_NUM_THREADS"] == "7"
    assert environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert environ["NCCL_SOCKET_IFNAME"] == "lo"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert child_environment("worker", threads=2)["OMP_NUM_THREADS"] == "2"
    assert child_environment("scheduler", threads=2)["OMP_NUM_THREADS"] == "1"
