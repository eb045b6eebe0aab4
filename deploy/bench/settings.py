"""The flags of `glimmer bench serve`, checked before anything is sent."""

import argparse
import json
import math
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ...shared.errors import UsageError

DATASETS = ("random", "text", "shared-prefix")
ROUTES = ("completions", "chat")
_MAX_TOKENS = 10_000_000
_HIDDEN = "***"


@dataclass(frozen=True)
class Settings:
    """The parsed flags. Lengths are in tokens. `concurrency` None: no limit. `request_rate` is in
    requests per second, None: limited only by the concurrency."""

    url: str
    model: str | None
    route: str
    concurrency: int | None
    request_rate: float | None
    num_prompts: int
    num_warmups: int
    dataset: str
    input_len: int
    output_len: int
    prefix_len: int
    num_prefixes: int
    range_ratio: float
    text_file: Path | None
    tokenizer: str
    vocab_size: int
    seed: int
    ignore_eos: bool
    temperature: float
    extra_body: dict[str, Any]
    api_key: str | None
    timeout_s: float
    details: bool
    json: Path | None

    def public(self) -> dict[str, Any]:
        """The settings as JSON values, without the API key."""
        paths = {name: value and str(value) for name, value in self._paths().items()}
        return {**vars(self), **paths, "api_key": self.api_key and _HIDDEN}

    def _paths(self) -> dict[str, Path | None]:
        return {"text_file": self.text_file, "json": self.json}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_settings(argv: Sequence[str], description: str | None) -> Settings:
    """Parse and check a command line. Raises UsageError naming the flag and its allowed values,
    and SystemExit after --help."""
    settings = Settings(**vars(_parser(description).parse_args(_with_underscores(argv))))
    _check(settings)
    return settings


def without_secrets(argv: Sequence[str]) -> list[str]:
    """The arguments with the API key hidden, for a report."""
    words = _with_underscores(argv)
    for i, word in enumerate(words):
        if word.startswith("--api_key="):
            words[i] = f"--api_key={_HIDDEN}"
        elif i and words[i - 1] == "--api_key":
            words[i] = _HIDDEN
    return words


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="glimmer bench serve",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_load_flags(parser)
    _add_prompt_flags(parser)
    return parser


def _add_load_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="server's base URL (%(default)s)")
    add("--model", help="name of the model; default: the first of /v1/models")
    add("--route", choices=ROUTES, default="completions", help="default: %(default)s")
    add("--concurrency", "--max_concurrency", type=int, help="most running requests; default: all")
    add(
        "--request_rate",
        type=float,
        help="requests per second on average, in a Poisson process; default: all at once",
    )
    add("--num_prompts", type=int, default=100, help="requests to measure (%(default)s)")
    add(
        "--num_warmups",
        type=int,
        default=1,
        help="requests before the measured ones, with different prompts (%(default)s)",
    )
    add("--ignore_eos", action="store_true", help="generate every reply to its full length")
    add("--temperature", type=float, default=0.0, help="default: %(default)s, greedy")
    add("--extra_body", type=_json_object, default={}, help="JSON object added to each request")
    add("--api_key", help="sent as bearer token; never written to the report")
    add(
        "--timeout_s",
        type=float,
        default=600.0,
        help="a request that receives nothing for this time fails (%(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write settings, environment and results")
    add("--details", action="store_true", help="also write each request's times to the JSON")


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="random", help="default: %(default)s")
    add("--input_len", type=int, default=1024, help="tokens of a prompt (%(default)s)")
    add("--output_len", type=int, default=128, help="tokens of a reply (%(default)s)")
    add(
        "--prefix_len",
        type=int,
        default=0,
        help="shared-prefix: shared tokens before the --input_len others",
    )
    add("--num_prefixes", type=int, default=1, help="shared-prefix: number of different prefixes")
    add(
        "--range_ratio",
        type=float,
        default=0.0,
        help="lengths vary uniformly by this share around --input_len and --output_len (0 to <1)",
    )
    add(
        "--text_file",
        type=Path,
        metavar="FILE",
        help="text: passages are cut from this file; default: Python's language reference",
    )
    add(
        "--tokenizer",
        default="auto",
        metavar="DIR|demo|auto|none",
        help="makes prompts of exact length; auto: the server's, if it tells its model directory "
        "and that is on this machine; none: random ids, or common words for --route chat",
    )
    add(
        "--vocab_size",
        type=int,
        default=150_000,
        help="without tokenizer: random ids are below this (%(default)s)",
    )
    add("--seed", type=int, default=0, help="of prompts, lengths and arrivals (%(default)s)")


def _check(s: Settings) -> None:
    for name in ("num_prompts", "input_len", "output_len", "num_prefixes", "vocab_size"):
        _require(1 <= getattr(s, name) <= _MAX_TOKENS, name, f"from 1 to {_MAX_TOKENS}")
    for name in ("num_warmups", "prefix_len"):
        _require(0 <= getattr(s, name) <= _MAX_TOKENS, name, f"from 0 to {_MAX_TOKENS}")
    _require(s.concurrency is None or s.concurrency >= 1, "concurrency", "at least 1")
    rate = s.request_rate
    _require(rate is None or 0 < rate < math.inf, "request_rate", "above 0 and finite")
    _require(0 <= s.range_ratio < 1, "range_ratio", "at least 0 and below 1")
    _require(0 <= s.temperature < math.inf, "temperature", "at least 0 and finite")
    _require(0 < s.timeout_s < math.inf, "timeout_s", "above 0 and finite")
    if s.dataset == "shared-prefix":
        _require(s.prefix_len > 0, "prefix_len", "above 0 with --dataset shared-prefix")
    else:
        _require(s.prefix_len == 0, "prefix_len", "left out without --dataset shared-prefix")
    if s.dataset != "text":
        _require(s.text_file is None, "text_file", "left out without --dataset text")
    if s.tokenizer == "none":
        _require(s.dataset != "text", "tokenizer", "given for --dataset text")
    parts = urllib.parse.urlsplit(s.url)
    is_http = parts.scheme in ("http", "https") and bool(parts.hostname)
    _require(is_http, "url", "like http://host:port")
    _require("@" not in parts.netloc, "url", "without user and password: use --api_key")
    if s.json is not None:
        _require(s.json.parent.is_dir(), "json", "in a directory that exists")


def _require(condition: bool, name: str, requirement: str) -> None:
    if not condition:
        raise UsageError(f"--{name} must be {requirement}")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _with_underscores(argv: Sequence[str]) -> list[str]:
    """Replace dashes in flag names, which `vllm bench serve` uses, by underscores."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        dashed = name.startswith("--") and len(name) > 2
        words.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if dashed else word)
    return words
