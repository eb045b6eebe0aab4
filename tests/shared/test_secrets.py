"""Keys leave no trace in the list of processes and in children."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from glimmer.shared.config import ServeConfig, forget_secret_variables
from glimmer.shared.secrets import key_digest

ARGUMENTS = [
    *("--model_dir", "demo", "--api_key", "sk-first", "--api-key=sk-second", "--port", "8000"),
    *("--admin_api_key", "sk-third", "--admin-api=sk-fourth", "--api_key_file", "/keys"),
]
PROGRAM = """
import os, subprocess, sys
from glimmer.deploy.cli import parse_with_logging
config = parse_with_logging(sys.argv[1:])
print(open("/proc/self/cmdline").read().split("\\0"))
print(config.api_key, config.admin_api_key)
print(subprocess.run(["env"], capture_output=True, text=True, check=True).stdout)
"""


def test_a_process_shows_its_arguments_without_keys() -> None:
    environment = {**os.environ, "GLIMMER_API_KEY": "sk-fifth"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *ARGUMENTS],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert "sk-" not in done.stdout + done.stderr
    for shown in ("'--api_key', '********'", "'--api-key=*********'", "'--port', '8000'"):
        assert shown in done.stdout
    assert "'--api_key_file', '/keys'" in done.stdout
    for key in ("sk-first", "sk-second", "sk-third", "sk-fourth"):
        assert key_digest(key) in done.stdout


def test_variables_with_keys_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIMMER_API_KEY", "x")
    monkeypatch.setenv("GLIMMER_ADMIN_API_KEY", "y")
    monkeypatch.setenv("HEALTH_TIMEOUT", "3")
    forget_secret_variables()
    assert not {"GLIMMER_API_KEY", "GLIMMER_ADMIN_API_KEY"} & os.environ.keys()
    assert os.environ["HEALTH_TIMEOUT"] == "3"


def test_the_saved_configuration_holds_digests(tmp_path: Path) -> None:
    config = ServeConfig(api_key=(key_digest("sk-x"),))
    config.save(tmp_path / "config.json")
    assert ServeConfig.load(tmp_path / "config.json") == config
    assert (tmp_path / "config.json").stat().st_mode & 0o077 == 0
