"""`glimmer demo`: serves the bundled model, asks it a question, shows commands to try next."""

import argparse
import dataclasses
import http.client
import json
import shlex
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ...shared.config import ServeConfig
from ...shared.errors import PortError, StartError, UsageError
from ..ask import ask as ask_server
from ..cli import parse_with_logging, with_model
from ..launcher.gpus import find_gpus
from ..launcher.launch import launch
from ..launcher.launcher import Launcher
from ..launcher.listen import bind_port
from ..launcher.supervise import Modules

MODEL_DIR = Path(__file__).with_name("model")
_NAME = "glimmer-demo"
_PROMPT = "Who are you?"


def demo(argv: Sequence[str], modules: Modules | None = None) -> int:
    """Serve the demo model until stopped, with --once until it has answered. All flags of
    `glimmer serve` are accepted. `modules` are the programs of the processes (None: the real
    ones). Returns the exit code. Raises StartError if the server cannot start or the question got
    no answer."""
    parser = argparse.ArgumentParser(
        prog="glimmer demo",
        description="Serve the bundled model and ask it a first question.",
        epilog="All flags of glimmer serve are accepted: see glimmer serve --help.",
    )
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    parser.add_argument("--prompt", default=_PROMPT, help="the question (default: %(default)s)")
    args, rest = parser.parse_known_args(argv)
    flags = ["--model_dir", "demo", "--log_level", "warning", *rest]
    config = _with_free_port(with_model(parse_with_logging(flags)))
    if config.has_keys or config.ssl_certfile is not None:
        raise UsageError(
            "the demo asks without API key and TLS: use `glimmer serve demo` for these"
        )
    failures: list[Exception] = []

    def ask(launcher: Launcher, url: str) -> None:
        try:
            ask_server(url, config.model_name, args.prompt)
        except (OSError, http.client.HTTPException, StartError) as error:
            failures.append(error)
        if args.once or failures:
            launcher.stop()
        else:
            commands = "\n  ".join(next_steps(url, config.model_name))
            print(f"\nTry next (Ctrl-C stops the server):\n  {commands}", flush=True)

    def on_ready(launcher: Launcher, url: str) -> None:
        threading.Thread(target=ask, args=(launcher, url), daemon=True).start()

    code = launch(config, modules, on_ready)
    if failures:
        raise StartError(f"the first question got no answer: {failures[0]}")
    return code


def demo_config(config: ServeConfig) -> ServeConfig:
    """`config` with the bundled model. Unless given otherwise: its name, reasoning apart from the
    answer, and on a CPU float32, which is faster there than bfloat16."""
    name = config.model_name
    on_gpu = config.device == "cuda" or (config.device == "auto" and find_gpus()[0])
    return dataclasses.replace(
        config,
        model_dir=str(MODEL_DIR),
        model_name=_NAME if name == "default_model_name" else name,
        data_type=config.data_type or (None if on_gpu else "float32"),
        reasoning_parser=config.reasoning_parser or "glm45",
    )


def _with_free_port(config: ServeConfig) -> ServeConfig:
    """Use a free port if the default port is taken. A port that was given is never changed."""
    if config.port != ServeConfig().port:
        return config
    try:
        bind_port(config.host, config.port).close()
    except PortError as error:
        print(f"{error}; the demo uses a free port", file=sys.stderr)
        return dataclasses.replace(config, port=0)
    return config


def next_steps(url: str, model: str) -> list[str]:
    """Shell commands that ask the server at `url`, which serves `model`."""
    chat = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    generate = {"inputs": "What is AI?", "parameters": {"max_new_tokens": 20}}
    header = '-H "Content-Type: application/json"'
    return [
        f"curl {url}/v1/chat/completions {header} -d {shlex.quote(json.dumps(chat))}",
        f"curl {url}/generate {header} -d {shlex.quote(json.dumps(generate))}",
        f"curl {url}/v1/models",
    ]
