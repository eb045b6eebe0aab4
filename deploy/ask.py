"""`glimmer ask`: asks a running server one question and streams the answer to the terminal."""

import argparse
import http.client
import json
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..shared.errors import StartError, UsageError

_MAX_TOKENS = 64
_TIMEOUT_S = 120.0


def main(argv: Sequence[str]) -> int:
    """Ask. Returns 0. Raises StartError if there is no answer, UsageError for wrong flags."""
    parser = argparse.ArgumentParser(
        prog="glimmer ask",
        description="Ask a running server one question. Fails unless it answers.",
    )
    parser.add_argument("url", help="such as http://localhost:8000")
    parser.add_argument("--question", default="Who are you?", help="(%(default)s)")
    parser.add_argument("--model", default="default_model_name", help="its name in /v1/models")
    parser.add_argument("--key_file", type=Path, help="file that holds the API key")
    parser.add_argument("--timeout_s", type=float, default=_TIMEOUT_S, help="(%(default)s)")
    args = parser.parse_args(argv)
    if not urllib.parse.urlsplit(args.url).scheme.startswith("http"):
        raise UsageError(f"{args.url}: not a URL such as http://localhost:8000")
    key = args.key_file.read_text().strip() if args.key_file else ""
    try:
        ask(args.url, args.model, args.question, key, args.timeout_s)
    except (OSError, http.client.HTTPException) as error:
        raise StartError(f"{args.url}: no answer: {error}") from error
    return 0


def ask(url: str, model: str, question: str, key: str = "", timeout_s: float = _TIMEOUT_S) -> None:
    """Print the question and, while it comes, the answer, with the reasoning in parentheses.

    Raises StartError if the server reports an error or says nothing, OSError or HTTPException if
    the connection fails, also when nothing comes for `timeout_s` seconds.
    """
    print(f"\n> {question}", flush=True)
    empty = True
    for text in _answer(url, model, question, key, timeout_s):
        print(text, end="", flush=True)
        empty = False
    print(flush=True)
    if empty:
        raise StartError(f"{url}: the answer is empty")


def _answer(url: str, model: str, question: str, key: str, timeout_s: float) -> Iterator[str]:
    parts = urllib.parse.urlsplit(url)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=timeout_s)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": _MAX_TOKENS,
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        path = parts.path.rstrip("/") + "/v1/chat/completions"
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != http.HTTPStatus.OK:
            raise StartError(f"HTTP {reply.status}: {reply.read(500).decode(errors='replace')}")
        yield from _texts(reply)
    finally:
        connection.close()


def _texts(lines: Iterator[bytes]) -> Iterator[str]:
    """The texts in a stream of server-sent events. Raises StartError for an error among them."""
    in_reasoning = False
    for line in lines:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise StartError(str(event["error"]))
        for choice in event["choices"]:
            delta = choice["delta"]
            reasoning = delta.get("reasoning_content") or ""
            content = delta.get("content") or ""
            if reasoning and not in_reasoning:
                yield "("
            if in_reasoning and content:
                yield ")\n"
            in_reasoning = bool(reasoning) or (in_reasoning and not content)
            if reasoning or content:
                yield reasoning + content
