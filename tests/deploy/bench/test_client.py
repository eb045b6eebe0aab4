"""One request at a time, to a server that behaves well or not."""

import socket
from typing import Any

import pytest
from glimmer.deploy.bench.client import Client, ask_server, is_local, open_session, served_model
from glimmer.deploy.bench.prompts import Prompt, load_tokenizer
from glimmer.deploy.bench.settings import parse_settings
from glimmer.deploy.bench.stream import Outcome
from glimmer.shared.errors import StartError
from scripted_server import DONE, RunningServer, chat_chunk, event, text_chunk, usage_chunk

PROMPT = Prompt([1, 2, 3], 3, 5)


async def send(
    server: RunningServer, *flags: str, prompt: Prompt = PROMPT, tokenizer: Any = None
) -> Outcome:
    settings = parse_settings(["--url", server.url + "/", *flags], None)
    async with open_session(settings) as session:
        return await Client(session, settings, "m", tokenizer).send(prompt)


async def test_a_completion_is_sent_and_counted(scripted: RunningServer) -> None:
    outcome = await send(scripted, "--ignore_eos", "--extra_body", '{"min_p": 0.1, "model": "n"}')
    assert scripted.paths == ["/v1/completions"]
    assert scripted.bodies == [
        {
            "model": "n",
            "prompt": [1, 2, 3],
            "max_tokens": 5,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "min_p": 0.1,
        }
    ]
    assert outcome.error is None
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.counted_by) == (3, 5, "usage")
    assert (outcome.num_chunks, len(outcome.gaps_s)) == (5, 4)
    assert 0 < outcome.ttft_s <= outcome.ttft_s + sum(outcome.gaps_s) <= outcome.e2e_s


async def test_a_chat_is_sent_and_counted(scripted: RunningServer) -> None:
    scripted.script = lambda body: [
        chat_chunk(role="assistant", content=""),
        chat_chunk(reasoning_content="so"),
        chat_chunk(content="well then"),
        chat_chunk("stop"),
        usage_chunk(12, 4),
        DONE,
    ]
    flags = ("--route", "chat", "--api-key", "hush", "--temperature", "0.5")
    outcome = await send(scripted, *flags, prompt=Prompt("Hello", 1, 9))
    (body,) = scripted.bodies
    assert scripted.paths == ["/v1/chat/completions"]
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert (body["max_tokens"], body["temperature"]) == (9, 0.5)
    assert "ignore_eos" not in body
    assert scripted.headers[0]["Authorization"] == "Bearer hush"
    assert outcome.error is None
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.num_chunks) == (12, 4, 2)


async def test_where_the_server_does_not_count_a_tokenizer_does_or_the_chunks(
    scripted: RunningServer,
) -> None:
    scripted.script = lambda body: [text_chunk("function "), text_chunk("call", "stop"), DONE]
    tokenizer = load_tokenizer("demo", {})
    assert tokenizer is not None
    outcome = await send(scripted, tokenizer=tokenizer)
    expected = len(tokenizer.encode("function call").ids)
    assert (outcome.output_tokens, outcome.counted_by) == (expected, "tokenizer")
    assert outcome.prompt_tokens == 3
    outcome = await send(scripted)
    assert (outcome.output_tokens, outcome.counted_by) == (2, "chunks")


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (400, {"error": {"message": "prompt: too long"}}, "HTTP 400: prompt: too long"),
        (429, {"message": "queue full"}, "HTTP 429: queue full"),
        (503, "<html> gone </html>", "HTTP 503: <html> gone </html>"),
        (302, {}, "HTTP 302: {}"),
    ],
)
async def test_a_refusal_is_a_failure_with_its_reason(
    status: int, answer: Any, words: str, scripted: RunningServer
) -> None:
    scripted.refusal = (status, answer)
    assert (await send(scripted)).error == words


async def test_an_error_inside_a_stream_is_a_failure(scripted: RunningServer) -> None:
    scripted.script = lambda body: [text_chunk("a"), event({"error": {"message": "lost"}}), DONE]
    assert (await send(scripted)).error == "lost"


async def test_a_broken_connection_is_a_failure(scripted: RunningServer) -> None:
    scripted.script = lambda body: [text_chunk("a")]
    scripted.cut = True
    assert "Client" in str((await send(scripted)).error)


async def test_a_silent_server_is_a_failure_in_time(scripted: RunningServer) -> None:
    scripted.script = lambda body: [text_chunk("a")]
    scripted.hang = True
    assert (await send(scripted, "--timeout_s", "0.2")).error == "no byte for 0.2 s"


async def test_a_server_is_asked_who_it_is(scripted: RunningServer) -> None:
    settings = parse_settings([], None)
    async with open_session(settings) as session:
        server = await ask_server(session, scripted.url)
        assert server["info"]["version"] == "7"
        assert server["version"] is None  # it has no such route
        assert served_model(server) == "scripted"
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
            with pytest.raises(StartError, match=f"no server answers at {url}"):
                await ask_server(session, url)


@pytest.mark.parametrize("models", [None, {}, {"data": []}, []])
def test_a_server_that_names_no_model_needs_the_flag(models: Any) -> None:
    with pytest.raises(StartError, match="--model"):
        served_model({"models": models})


def test_only_this_machine_is_local() -> None:
    for url in ("http://localhost:1", "http://127.0.0.3", "http://[::1]:8"):
        assert is_local(url)
    assert not is_local("http://node-127.example:8000")
