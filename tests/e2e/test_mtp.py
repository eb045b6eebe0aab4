"""Servers with drafts answer as a server without, field by field, streamed and whole, also when a
worker dies. The model's drafts are often right, so most steps bring several tokens."""

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from models import make_guessable
from server import RunningServer, running_server, wait_until

KINDS = {
    "eagle on two ranks": (
        *("--mtp_mode", "eagle_with_att", "--mtp_step", "3", "--mtp_fixed_step"),
        *("--tp", "2"),
    ),
    "vanilla": ("--mtp_mode", "vanilla_with_att", "--mtp_step", "2", "--mtp_fixed_step"),
}
FLAGS = ("--data_type", "float32", "--max_total_token_num", "16384", "--enable_prompt_logprobs")
# These say when and how, not what. The server without drafts is used by several tests, so it finds
# more in its cache.
IGNORED = (
    "id",
    "created",
    "request_id",
    "mtp_accepted_token_num",
    "cached_tokens",
    "prompt_cache_len",
)
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 20, "maxLength": 40}},
    "required": ["name"],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}},
                "required": ["city"],
            },
        },
    }
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guessable")
    make_guessable(path)
    return path


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(model, tmp_path_factory.mktemp("plain"), *FLAGS) as running:
        yield running


FIRST, SECOND = KINDS


@pytest.fixture(scope="module", params=[FIRST, pytest.param(SECOND, marks=pytest.mark.slow)])
def drafting(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    flags = (*FLAGS, *KINDS[request.param])
    with running_server(model, tmp_path_factory.mktemp("drafting"), *flags) as running:
        yield running


def generate(text: str, **parameters: Any) -> tuple[str, Any]:
    details = {"return_details": True, "max_new_tokens": 40, **parameters}
    return "/generate", {"inputs": text, "parameters": details}


def chat(text: str, **fields: Any) -> tuple[str, Any]:
    messages = [{"role": "user", "content": text}]
    usage = {"stream_options": {"include_usage": True}} if fields.get("stream") else {}
    return "/v1/chat/completions", {
        **{"model": "m", "messages": messages, "max_tokens": 50, "temperature": 0.0},
        **{**PLAIN, **usage, **fields},
    }


def completion(text: str, **fields: Any) -> tuple[str, Any]:
    return "/v1/completions", {"model": "m", "prompt": text, "max_tokens": 40, **fields}


def requests(stream: bool = False) -> list[tuple[str, Any]]:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    streamed = {"stream": True} if stream else {}
    asked = [
        chat("Hello", ignore_eos=True, logprobs=True, top_logprobs=2, **streamed),
        chat("What is it", temperature=0.3, seed=3, n=3, logprobs=True, **streamed),
        chat("A name", response_format=form, temperature=0.2, seed=2, **streamed),
        chat("Weather", tools=TOOLS, tool_choice="required", seed=1, **streamed),
        chat("The end", stop=["e", "the"], ignore_eos=True, max_tokens=90, **streamed),
        completion("of the", n=3, temperature=0.4, seed=5, logprobs=1, **streamed),
        completion("to be", temperature=0.0, frequency_penalty=0.7, **streamed),
    ]
    if not stream:
        asked += [
            generate("Hello", ignore_eos=True, return_logprobs=True),
            generate("What", do_sample=True, temperature=0.3, seed=4, min_new_tokens=30),
            generate("any", do_sample=True, seed=9, repetition_penalty=1.2, ignore_eos=True),
            generate("all we can", stop_sequences=["a", "or"], ignore_eos=True),
        ]
    return asked


def same(found: Any, wanted: Any, where: str = "") -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            if key not in IGNORED:
                same(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for place, pair in enumerate(zip(found, wanted, strict=True)):
            same(*pair, f"{where}[{place}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=2e-4), where
    else:
        assert found == wanted, where


def ask(server: RunningServer, request: tuple[str, Any]) -> Any:
    status, reply = server.post(*request)
    assert status == 200, reply
    return reply


def events(server: RunningServer, request: tuple[str, Any]) -> dict[Any, Any]:
    """What a stream adds up to: strings joined, the last of everything else; logprobs in a row."""
    path, body = request
    data = json.dumps(body).encode()
    http = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    found: dict[Any, Any] = {}

    def add(where: tuple[Any, ...], value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if key not in IGNORED:
                    add((*where, key), item)
        elif isinstance(value, list) and "logprobs" not in where:
            for item in value:
                add((*where, item.get("index")), item)
        elif isinstance(value, str | list) and where[-1] not in ("object", "role", "model"):
            found[where] = found.get(where, type(value)()) + value
        elif value is not None:
            found[where] = value

    with urllib.request.urlopen(http, timeout=60) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                add((), json.loads(line[6:]))
    return found


def all_at_once(server: RunningServer, call: Any, asked: list[tuple[str, Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda request: call(server, request), asked))


def test_replies_are_those_without_drafts(plain: RunningServer, drafting: RunningServer) -> None:
    asked = requests()
    pairs = (all_at_once(server, ask, asked) for server in (drafting, plain))
    for request, found, wanted in zip(asked, *pairs, strict=True):
        same(found, wanted, str(request[1].get("prompt", request[1])))


def test_streams_are_those_without_drafts(plain: RunningServer, drafting: RunningServer) -> None:
    asked = requests(stream=True)
    pairs = (all_at_once(server, events, asked) for server in (drafting, plain))
    for found, wanted in zip(*pairs, strict=True):
        assert wanted
        same(found, wanted)


def test_metrics_tell_of_drafts(drafting: RunningServer) -> None:
    step = json.loads(drafting.get("/get_server_info")[1])["mtp_step"]
    ask(drafting, generate("Hello", ignore_eos=True, max_new_tokens=120))
    wait_until(lambda: drafting.metric("glimmer_mtp_avg_token_per_step") > 1.2, 10, "a heartbeat")
    assert drafting.metric("glimmer_draft_length") == step
    assert drafting.metric("lightllm_request_mtp_avg_token_per_step_sum") > 0
    shares = [
        drafting.metric("glimmer_drafts_accepted_total", position=str(place))
        / drafting.metric("glimmer_drafts_total", position=str(place))
        for place in range(1, step + 1)
    ]
    assert 1 > shares[0] > 0.2
    assert shares == sorted(shares, reverse=True)


def test_streams_go_on_after_a_worker_died(plain: RunningServer, drafting: RunningServer) -> None:
    def tokens(server: RunningServer, number: int) -> list[int]:
        values = {"do_sample": number % 2 == 1, "temperature": 0.3, "seed": number}
        return server.token_ids([number + 1] * 20, max_new_tokens=100, ignore_eos=True, **values)

    with ThreadPoolExecutor(6) as pool:
        wanted = list(pool.map(lambda number: tokens(plain, number), range(6)))
        before = drafting.metric("glimmer_generated_tokens_total")
        running = [pool.submit(tokens, drafting, number) for number in range(6)]
        wait_until(
            lambda: drafting.metric("glimmer_generated_tokens_total") > before + 20, 30, "tokens"
        )
        os.kill(drafting.processes()["worker-0"], signal.SIGKILL)
        assert [reply.result(120) for reply in running] == wanted
    assert "lost worker" in drafting.log.read_text()
