import dataclasses
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from glimmer.deploy.demo.run import demo_checkpoint, demo_config
from glimmer.shared.config import ServeConfig
from glimmer.shared.model_spec import load_model_spec

Serve = Callable[..., Any]  # the fixture in ../conftest.py


def test_the_demo_answers_and_ends(serve: Serve) -> None:
    server = serve("--once", "--prompt", "Who are you?", command="demo")
    out, _ = server.process.communicate(timeout=30)
    assert server.process.returncode == 0
    assert "> Who are you?\na fake answer\n" in out
    assert "curl" not in out


def test_the_demo_keeps_serving_and_shows_what_to_try(serve: Serve) -> None:
    server = serve(command="demo")
    url = server.ready_line().split()[3]
    assert server.process.stdout is not None
    lines = iter(server.process.stdout.readline, "")
    shown = next(line for line in lines if "/v1/models" in line)
    assert shown.strip() == f"curl {url}/v1/models"
    server.signal(signal.SIGINT)
    assert server.wait() == 0


def test_the_demo_takes_a_free_port_when_the_usual_one_is_taken(serve: Serve) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", 8000))
            other.listen()
        except OSError:
            pass  # taken anyway
        server = serve("--once", port=8000, command="demo")
        assert "http://127.0.0.1:8000 " not in server.ready_line()
        server.process.communicate(timeout=30)
    assert server.process.returncode == 0
    assert "port 8000 is in use by " in server.log
    assert "; the demo takes a free one" in server.log


def test_a_question_without_answer_is_a_failure(serve: Serve) -> None:
    server = serve("--once", "--model_owner", "rude-frontend", command="demo")
    assert server.wait() == 1
    assert "the first question got no answer: HTTP 503" in server.log


def test_the_checkpoint_is_made_once_and_whole(tmp_path: Path) -> None:
    path = demo_checkpoint(tmp_path)
    made = (path / "config.json").stat().st_mtime_ns
    assert demo_checkpoint(tmp_path) == path
    assert (path / "config.json").stat().st_mtime_ns == made
    assert list(tmp_path.iterdir()) == [path]
    load_model_spec(path)


def test_the_demo_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = demo_config(ServeConfig(model_dir="demo"))
    assert config.model_name == "glimmer-demo"
    assert Path(config.model_dir).parent == tmp_path / "glimmer"
    named = dataclasses.replace(config, model_name="mine")
    assert demo_config(named).model_name == "mine"
