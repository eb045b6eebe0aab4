"""Which request bodies are read, and which are refused before they take memory."""

import asyncio
import codecs
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from glimmer.frontend.wire import body


async def test_large_bodies_are_refused_before_they_are_read(server: Any) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)  # not a byte of it was sent
    assert head.startswith(b"HTTP/1.1 413")
    assert b"Connection: close" in head
    writer.close()
    await writer.wait_closed()


async def test_large_chunked_bodies_are_refused_on_the_way(server: Any) -> None:
    async def spaces() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * (1 << 16)

    async with server.session.post(server.url + "/generate", data=spaces()) as reply:
        assert reply.status == 413
        assert "1 MB" in (await reply.json())["message"]
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200


PLAIN = json.dumps({"inputs": "x" * 50, "parameters": {"max_new_tokens": 2}}).encode()


async def send(server: Any, data: bytes, coding: str, path: str = "/generate") -> tuple[int, Any]:
    headers = {"Content-Encoding": coding}
    async with server.session.post(server.url + path, data=data, headers=headers) as reply:
        return reply.status, await reply.json()


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", gzip.compress(PLAIN, mtime=0)),
        ("GZIP", gzip.compress(b" " * 900_000 + PLAIN, mtime=0)),
        ("x-gzip", gzip.compress(PLAIN, mtime=0)),
        ("deflate", zlib.compress(PLAIN)),
        ("identity", PLAIN),
        ("identity", codecs.BOM_UTF8 + PLAIN),
        ("gzip", gzip.compress(codecs.BOM_UTF8 + PLAIN, mtime=0)),
    ],
)
async def test_compressed_bodies_are_read(server: Any, coding: str, data: bytes) -> None:
    status, reply = await send(server, data, coding)
    assert status == 200, reply


async def test_bodies_are_limited_as_they_are_after_decoding(server: Any) -> None:
    for size in (1 << 21, 1 << 28):
        status, reply = await send(server, gzip.compress(b" " * size, mtime=0), "gzip")
        assert (status, "1 MB" in reply["message"]) == (413, True)
    assert (await send(server, gzip.compress(PLAIN, mtime=0), "gzip"))[0] == 200


@pytest.mark.parametrize(
    ("coding", "data", "status"),
    [
        ("gzip", PLAIN, 400),
        ("gzip", gzip.compress(PLAIN, mtime=0)[:-9], 400),
        ("gzip", gzip.compress(PLAIN, mtime=0) + b"more", 400),
        ("gzip", b"", 400),
        ("br", PLAIN, 415),
        ("zstd", PLAIN, 415),
        ("gzip, gzip", PLAIN, 415),
    ],
)
async def test_other_codings_are_refused_by_name(
    server: Any, coding: str, data: bytes, status: int
) -> None:
    for path in ("/generate", "/tokens"):
        found, reply = await send(server, data, coding, path)
        assert found == status
        assert reply["error"]["param"] == "Content-Encoding"
        assert coding in reply["message"]


async def test_bodies_that_never_arrive_time_out(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 0.05)
    port = int(server.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    assert head.startswith(b"HTTP/1.1 408")
    assert server.frontend.num_open == 0
    writer.close()
    await writer.wait_closed()


async def test_half_sent_bodies_take_bounded_memory(start: Any) -> None:
    server = await start(max_client_mb=16.0)

    def held() -> int:
        return server.frontend.connections.budget.held

    port = int(server.url.rsplit(":", 1)[1])
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\n"
    slow = []
    for _ in range(16):  # of 1 MB each, but for the last byte
        slow.append((await asyncio.open_connection("127.0.0.1", port))[1])
        slow[-1].write(head + b" " * (1048576 - 1))
    await server.settle(lambda: held() == 16 * (1048576 - 1))
    answer = await server.exchange(head + b" " * 100)
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"Retry-After: 1" in answer
    slow.pop().close()
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200
    for writer in slow:
        writer.close()
    await server.settle(lambda: held() == 0)
