import dataclasses
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glimmer.deploy.demo.checkpoint import CHAT_TEMPLATE
from glimmer.deploy.demo.run import MODEL_DIR, demo_config
from glimmer.shared.config import ServeConfig
from glimmer.shared.model_spec import load_model_spec

Serve = Callable[..., Any]  # the fixture in ../conftest.py


def test_the_demo_keeps_serving_and_shows_what_to_try(serve: Serve) -> None:
    server = serve(command="demo")
    url = server.ready_line().split()[3]
    assert server.process.stdout is not None
    lines = iter(server.process.stdout.readline, "")
    shown = next(line for line in lines if "/v1/models" in line)
    assert shown.strip() == f"curl {url}/v1/models"
    server.signal(signal.SIGINT)
    assert server.wait() == 0


def test_the_demo_answers_on_a_free_port_if_the_usual_one_is_taken(serve: Serve) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", 8000))
            other.listen()
        except OSError:
            pass  # taken anyway
        server = serve("--once", "--prompt", "Who are you?", port=8000, command="demo")
        assert "http://127.0.0.1:8000 " not in server.ready_line()
        out, _ = server.process.communicate(timeout=30)
    assert server.process.returncode == 0
    assert "> Who are you?\na fake answer\n" in out
    assert "curl" not in out
    assert "port 8000 is in use by " in server.log
    assert "; the demo uses a free port" in server.log


def test_a_question_without_answer_is_a_failure(serve: Serve) -> None:
    server = serve("--once", "--model_owner", "rude-frontend", command="demo")
    assert server.wait() == 1
    assert "the first question got no answer: HTTP 503" in server.log


def test_the_model_is_the_bundled_one_on_every_way() -> None:
    config = demo_config(ServeConfig(model_dir="demo", device="cpu"))
    assert (config.model_name, config.data_type) == ("glimmer-demo", "float32")
    assert config.reasoning_parser == "glm45"
    assert load_model_spec(Path(config.model_dir)).num_nextn_layers == 1
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) < 24e6
    assert demo_config(dataclasses.replace(config, device="cuda", data_type=None)).data_type is None


def test_what_was_asked_for_is_kept() -> None:
    asked = ServeConfig(model_dir="demo", device="cpu", model_name="mine", data_type="bf16")
    config = demo_config(asked)
    assert (config.model_name, config.data_type) == ("mine", "bf16")


def test_the_template_is_the_one_that_was_trained_with() -> None:
    assert (MODEL_DIR / "chat_template.jinja").read_bytes() == CHAT_TEMPLATE.read_bytes()
