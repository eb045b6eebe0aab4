"""`glimmer demo`: serve the bundled model, ask it something over HTTP, show how to go on."""

import argparse
import dataclasses
import hashlib
import http.client
import json
import shutil
import sys
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...shared.cache_dir import user_cache_dir
from ...shared.config import ServeConfig
from ...shared.errors import PortError, StartError
from ..cli import parse_with_logging
from ..launch import launch
from ..listen import bind_port
from ..server import Server
from ..supervise import Modules

_NAME = "glimmer-demo"
_PROMPT = "Hello! What is AI?"
_MAX_TOKENS = 64
_ANSWER_TIMEOUT_S = 120.0


def demo(argv: Sequence[str], modules: Modules | None = None) -> int:
    """Serve the demo model until stopped (--once: until the answer is there). All flags of
    `glimmer serve` are taken too; `modules` are what runs (None: the real ones). Returns the
    exit code. Raises StartError if the server cannot start or the question got no answer."""
    parser = argparse.ArgumentParser(
        prog="glimmer demo",
        description="Serve the bundled model and ask it a first question.",
        epilog="All flags of glimmer serve work, too.",
    )
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    parser.add_argument("--prompt", default=_PROMPT, help="what to ask (default: %(default)s)")
    args, rest = parser.parse_known_args(argv)
    config = parse_with_logging(["--model_dir", "demo", "--log_level", "warning", *rest])
    if config.model_dir == "demo":
        config = demo_config(config)
    config = _with_free_port(config)
    failures: list[Exception] = []

    def ask(server: Server, url: str) -> None:
        try:
            _ask(url, config.model_name, args.prompt)
        except (OSError, http.client.HTTPException, StartError) as error:
            failures.append(error)
        if args.once or failures:
            server.stop()
        else:
            _show_next_steps(url, config.model_name)

    def on_ready(server: Server, url: str) -> None:
        threading.Thread(target=ask, args=(server, url), daemon=True).start()

    code = launch(config, modules, on_ready)
    if failures:
        raise StartError(f"the first question got no answer: {failures[0]}")
    return code


def demo_config(config: ServeConfig) -> ServeConfig:
    """`config` with the demo checkpoint, made on first use and kept in the user's cache."""
    name = config.model_name
    return dataclasses.replace(
        config,
        model_dir=str(demo_checkpoint(user_cache_dir())),
        model_name=_NAME if name == "default_model_name" else name,
    )


def demo_checkpoint(cache: Path) -> Path:
    """The demo checkpoint's directory in `cache`. Made in full or not at all; another version of
    its maker makes another one."""
    from . import checkpoint

    recipe = b"".join(
        Path(file).read_bytes() for file in (checkpoint.__file__, checkpoint.CHAT_TEMPLATE)
    )
    path = cache / f"demo-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if path.is_dir():
        return path
    print("making the demo checkpoint", file=sys.stderr)
    unfinished = Path(tempfile.mkdtemp(prefix=".demo-", dir=cache))
    try:
        checkpoint.make_checkpoint(unfinished)
        unfinished.rename(path)
    except OSError as error:
        if not path.is_dir():  # else another process was faster
            raise StartError(f"cannot make the demo checkpoint in {cache}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _with_free_port(config: ServeConfig) -> ServeConfig:
    """Only the default port may be swapped for a free one: one that was asked for is meant."""
    if config.port != ServeConfig().port:
        return config
    try:
        bind_port(config.host, config.port).close()
    except PortError as error:
        print(f"{error}; the demo takes a free one", file=sys.stderr)
        return dataclasses.replace(config, port=0)
    return config


def _ask(url: str, model: str, prompt: str) -> None:
    """Stream one chat answer to the terminal."""
    print(f"\n> {prompt}", flush=True)
    for piece in _answer(url, model, prompt):
        print(piece, end="", flush=True)
    print(flush=True)


def _answer(url: str, model: str, prompt: str) -> Iterator[str]:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=_ANSWER_TIMEOUT_S)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": _MAX_TOKENS,
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != http.HTTPStatus.OK:
            raise StartError(f"HTTP {reply.status}: {reply.read(500).decode(errors='replace')}")
        for line in reply:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise StartError(str(event["error"]))
            for choice in event["choices"]:
                delta = choice["delta"]
                yield (delta.get("reasoning_content") or "") + (delta.get("content") or "")
    finally:
        connection.close()


def _show_next_steps(url: str, model: str) -> None:
    chat = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    plain = json.dumps({"inputs": "What is AI?", "parameters": {"max_new_tokens": 20}})
    header = '-H "Content-Type: application/json"'
    print(
        f"\nTry next (Ctrl-C stops the server):\n"
        f"  curl {url}/v1/chat/completions {header} -d '{chat}'\n"
        f"  curl {url}/generate {header} -d '{plain}'\n"
        f"  curl {url}/v1/models",
        flush=True,
    )
