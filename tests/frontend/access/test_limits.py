"""Limits of keys over HTTP: 429 in the format of each interface, Retry-After, and what is left."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from glimmer.shared.secrets import key_digest

A, B = key_digest("sk-a"), key_digest("sk-b")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(server: Any, path: str, body: Any, key: str = "sk-a") -> tuple[int, Any, Any]:
    async with server.session.post(server.url + path, json=body, headers=bearer(key)) as reply:
        is_json = reply.content_type == "application/json"
        return reply.status, await (reply.json() if is_json else reply.text()), reply.headers


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/responses", {"input": "x"}),
        ("/generate_stream", {"inputs": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}),
    ],
)
async def test_more_open_requests_than_allowed_are_a_429(start: Any, path: str, body: Any) -> None:
    server = await start(api_key=(A, B), key_max_requests=2)
    server.engine.manual = True
    asking = [asyncio.create_task(ask(server, path, body)) for _ in range(2)]
    submits = await server.engine.submitted(2)
    status, reply, headers = await ask(server, path, body)
    assert (status, headers["Retry-After"]) == (429, "1")
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    kind = "rate_limit_error" if path == "/v1/messages" else "RateLimitError"
    assert reply["error"]["type"] == kind
    other = asyncio.create_task(ask(server, path, body, "sk-b"))
    await server.engine.submitted(3)
    for submit in submits:
        server.engine.tokens(submit, [275])
        server.engine.finish(submit, "stop", 1)
    for status, _, headers in [*await asyncio.gather(*asking), await other]:
        assert status == 200
        assert headers["x-ratelimit-remaining-requests"] in ("0", "1", "2")
    server.engine.manual = False
    assert (await ask(server, path, body))[0] == 200


async def test_the_tokens_of_a_minute_are_used_up(start: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"a:{A} tokens_per_minute=60\nb:{B}")
    server = await start(api_key_file=str(tmp_path / "keys"))
    body = {"inputs": [1] * 50, "parameters": {"max_new_tokens": 3}}
    status, _, headers = await ask(server, "/generate", body)
    assert (status, headers["x-ratelimit-limit-tokens"]) == (200, "60")
    assert headers["x-ratelimit-remaining-tokens"] in ("7", "8")
    assert (await ask(server, "/generate", body))[0] == 200
    status, reply, headers = await ask(server, "/generate", body)
    assert status == 429
    assert 40 <= int(headers["Retry-After"]) <= 48
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    assert float(headers["x-ratelimit-reset-tokens"].rstrip("s")) > 60
    assert "60 tokens per minute" in reply["message"]
    status, _, headers = await ask(server, "/generate", body, "sk-b")
    assert status == 200
    assert not any("ratelimit" in name.lower() for name in headers)


async def test_prompts_that_wait_are_counted_until_their_first_token(start: Any) -> None:
    server = await start(api_key=(A,), key_max_queued_tokens=100)
    server.engine.manual = True
    body = {"inputs": [1] * 80}
    first = asyncio.create_task(ask(server, "/generate", body))
    [submit] = await server.engine.submitted()
    status, reply, headers = await ask(server, "/generate", body)
    assert (status, headers["Retry-After"]) == (429, "1")
    assert "80 prompt tokens of this key are waiting" in reply["message"]
    server.engine.tokens(submit, [275])
    second = None
    async with asyncio.timeout(10):
        while len(server.engine.submits) < 2:  # once the token is here
            if second is None or second.done():
                second = asyncio.create_task(ask(server, "/generate", body))
            await asyncio.sleep(0.01)
    for submit in server.engine.submits:
        server.engine.finish(submit, "stop", int(submit is server.engine.submits[0]))
    assert second is not None
    assert [(await task)[0] for task in (first, second)] == [200, 200]


async def test_clients_that_leave_free_their_place(start: Any) -> None:
    server = await start(api_key=(A,), key_max_requests=1)
    server.engine.manual = True
    for count in range(1, 6):
        asking = asyncio.create_task(ask(server, "/generate", {"inputs": [1]}))
        submits = await server.engine.submitted(count)
        asking.cancel()
        await server.settle(lambda: server.frontend.num_open == 0)
        server.engine.finish(submits[-1], "abort")


async def test_bytes_are_limited_per_key(start: Any) -> None:
    server = await start(api_key=(A, B), max_client_mb=1.0, max_body_mb=1.0)
    host, port = "127.0.0.1", int(server.url.rsplit(":", 1)[1])
    head = (
        "POST /generate HTTP/1.1\r\nHost: x\r\nx-api-key: sk-{}\r\nContent-Length: 900000\r\n\r\n"
    )
    writers = []
    budget = server.frontend.connections.budget
    for number in range(1, 3):  # half a megabyte is for one key
        writers.append((await asyncio.open_connection(host, port))[1])
        writers[-1].write(head.format("a").encode() + b" " * 240_000)
        await server.settle(lambda number=number: budget.held == number * 240_000)
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(head.format("a").encode() + b" " * 100_000)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 429")
    assert b"this key's requests hold 0.5 MB" in await reader.readuntil(b"}")
    writers.append((await asyncio.open_connection(host, port))[1])
    writers[-1].write(head.format("b").encode() + b" " * 200_000)
    await server.settle(lambda: budget.held == 680_000)
    for one in (*writers, writer):
        one.close()
    await server.settle(lambda: budget.held == 0)
