"""What clients may make the server hold, and for how long: heads, unread replies, floods."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from glimmer.frontend.wire.connection import Budget, Limits
from glimmer.shared.errors import OverloadedError
from glimmer.shared.messages import TokenLogprob, TokenRow, Tokens

POST = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
BODY = b'{"inputs": "x", "parameters": {"max_new_tokens": 500}}'
PROBE = b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n"


def post(path: bytes, body: bytes = BODY) -> bytes:
    return POST % (path, len(body), body)


def big_row(submit: Any) -> Any:
    top = [(n, -1.0) for n in range(400)]
    return Tokens([TokenRow(submit.request_id, [5], [TokenLogprob(5, -1.0, 1, top)])])


def port(server: Any) -> int:
    return int(server.url.rsplit(":", 1)[1])


@contextlib.asynccontextmanager
async def unread(server: Any, data: bytes, buffer: int = 4096) -> AsyncIterator[socket.socket]:
    """A connection on which `data` was sent, and nothing is read. `buffer`: for what arrives."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port(server)))
    await loop.sock_sendall(sock, data)
    with sock:
        yield sock


@contextlib.asynccontextmanager
async def checked(server: Any, **limits: float) -> AsyncIterator[Any]:
    """The connections, checked as a running server does, with these limits."""
    connections = server.frontend.connections
    connections.limits = Limits(**limits)
    watch = asyncio.create_task(connections.run())
    yield connections
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)


async def test_a_client_that_stops_reading_a_stream_is_cut_and_aborted(start: Any) -> None:
    server = await start()
    server.engine.manual = True
    async with (
        checked(server, stall_s=0.2) as connections,
        unread(server, post(b"/generate_stream")),
    ):
        submit = (await server.engine.submitted())[0]
        for _ in range(499):  # far more than the buffers between here and there hold
            server.engine.send(big_row(submit))
            await asyncio.sleep(0)
        await server.settle(lambda: connections.num_cut == 1)
        await server.engine.until(lambda: server.engine.aborted_ids == [submit.request_id])
        await server.settle(lambda: connections.budget.held == 0)
    server.engine.manual = False
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200


async def test_a_client_that_stops_reading_a_plain_reply_is_cut(start: Any) -> None:
    server = await start()
    server.engine.manual = True
    async with checked(server, stall_s=0.2) as connections, unread(server, post(b"/generate")):
        submit = (await server.engine.submitted())[0]
        for _ in range(499):
            server.engine.send(big_row(submit))
        server.engine.finish(submit, "stop", 499)
        await server.settle(lambda: connections.budget.held > 1 << 20)
        await server.settle(lambda: connections.num_cut == 1)
        await server.settle(lambda: connections.budget.held == 0)
        assert server.frontend.num_open == 0


async def test_a_slow_reader_that_makes_progress_is_not_cut(start: Any) -> None:
    server = await start()
    server.engine.manual = True
    loop = asyncio.get_running_loop()
    async with (
        checked(server, stall_s=0.5) as connections,
        unread(server, post(b"/generate"), buffer=1 << 18) as sock,
    ):
        submit = (await server.engine.submitted())[0]
        for _ in range(499):
            server.engine.send(big_row(submit))
        server.engine.finish(submit, "stop", 499)
        size = 0
        started = loop.time()
        while b'"input_usage"' not in (received := await loop.sock_recv(sock, 1 << 17)):
            size += len(received)
            await asyncio.sleep(0.02)
        assert size > 10_000_000
        assert loop.time() - started > 1.0
        assert connections.num_cut == 0


async def test_heads_that_never_end_cost_little_and_are_cut(server: Any) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 1000
    writers = []
    async with checked(server, head_s=0.3) as connections:
        for _ in range(20):
            writers.append((await asyncio.open_connection("127.0.0.1", port(server)))[1])
            writers[-1].write(head)
        await server.settle(lambda: connections.budget.held == 20 * len(head))
        await server.settle(lambda: connections.num_cut == 20)
        await server.settle(lambda: connections.budget.held == 0)
    for writer in writers:
        writer.close()


async def test_heads_that_are_too_large_are_refused(server: Any) -> None:
    for data in (b"A: b\r\n" * 12_000, b"A: " + b"a" * 70_000):
        answer = await server.exchange(b"GET /health HTTP/1.1\r\nHost: x\r\n" + data)
        assert answer.startswith(b"HTTP/1.1 431")


async def test_silent_connections_end_and_idle_ones_stay(server: Any) -> None:
    async with checked(server, idle_s=0.2) as connections:
        silent, other = await asyncio.open_connection("127.0.0.1", port(server))
        assert (await server.get("/liveness"))[0] == 200  # kept open by the client
        assert await asyncio.wait_for(silent.read(), 10) == b""
        assert connections.num_cut == 1
        assert (await server.get("/liveness"))[0] == 200
        other.close()


async def test_heads_in_parts_and_one_after_the_other(server: Any) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port(server))
    for data in (PROBE, post(b"/generate")):
        for n in range(0, len(data), 7):
            writer.write(data[n : n + 7])
            await writer.drain()
            await asyncio.sleep(0)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert head.startswith(b"HTTP/1.1 200")
        length = next(h for h in head.split(b"\r\n") if h.lower().startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
    writer.close()


async def test_requests_that_do_not_wait_for_replies_are_answered_in_order(server: Any) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port(server))
    data = post(b"/generate") + PROBE + post(b"/generate", b"{}") + PROBE
    for n in range(0, len(data), 50):
        writer.write(data[n : n + 50])
        await writer.drain()
        await asyncio.sleep(0.001)
    statuses = []
    for _ in range(4):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        statuses.append(int(head.split()[1]))
        length = next(h for h in head.split(b"\r\n") if h.lower().startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
    assert statuses == [200, 200, 400, 200]
    writer.close()


async def test_endless_requests_during_a_reply_are_cut(start: Any) -> None:
    server = await start()
    server.engine.manual = True
    reader, writer = await asyncio.open_connection("127.0.0.1", port(server))
    writer.write(post(b"/generate"))
    submit = (await server.engine.submitted())[0]
    with contextlib.suppress(ConnectionError):
        for _ in range(50):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 1000)
            await writer.drain()
            await asyncio.sleep(0.001)
        await asyncio.wait_for(reader.read(), 10)
    await server.engine.until(lambda: server.engine.aborted_ids == [submit.request_id])
    writer.close()


async def test_posts_to_a_full_server_are_refused_at_once(start: Any) -> None:
    server = await start(max_queued_requests=1, running_max_req_size=1)
    server.engine.manual = True
    waiting = [asyncio.create_task(server.post("/generate", {"inputs": "x"})) for _ in range(2)]
    await server.engine.submitted(2)
    reader, writer = await asyncio.open_connection("127.0.0.1", port(server))
    for path, word in ((b"/generate", b"RateLimitError"), (b"/v1/messages", b"rate_limit_error")):
        for data in (post(path), post(path).replace(b"Host: x", b"X-Request-Id: mine 1")):
            writer.write(data)  # on the same connection
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            assert head.startswith(b"HTTP/1.1 429")
            assert b"Retry-After: 5" in head
            assert (b"X-Request-Id: mine1\r\n" in head) == (b"mine" in data)
            length = next(h for h in head.split(b"\r\n") if h.startswith(b"Content-Length"))
            assert word in await reader.readexactly(int(length.split()[1]))
    writer.write(PROBE)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    writer.close()
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    assert (await server.exchange(head)).startswith(b"HTTP/1.1 429"), "before the body was sent"
    text = (await server.get("/metrics"))[1]
    assert 'lightllm_request_failure_total{model_name="tiny"} 5.0' in text
    for submit in server.engine.submits:
        server.engine.finish(submit, "stop")
    assert [status for status, _ in await asyncio.gather(*waiting)] == [200, 200]
    server.engine.manual = False
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200


async def test_many_posts_at_once_are_all_answered_and_probes_pass_them(start: Any) -> None:
    server = await start(max_queued_requests=50, running_max_req_size=10)

    async def status(data: bytes) -> int:
        return int((await server.exchange(data)).split()[1])

    replies = await asyncio.gather(*(status(post(b"/generate")) for _ in range(300)))
    assert set(replies) <= {200, 429}
    assert replies.count(200) >= 60
    assert await status(PROBE) == 200
    await server.settle(lambda: server.frontend.num_open == 0)
    assert server.frontend.connections.budget.held == 0


async def test_the_memory_of_all_clients_together_is_bounded(start: Any) -> None:
    server = await start(max_client_mb=1.0, max_body_mb=1.0)
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n"
    answer = await server.exchange(head + b" " * 300_000)
    assert answer.startswith(b"HTTP/1.1 429"), "a quarter is for one connection"
    budget = server.frontend.connections.budget
    writers = []
    for _ in range(4):
        writers.append((await asyncio.open_connection("127.0.0.1", port(server)))[1])
        writers[-1].write(head + b" " * 250_000)
    await server.settle(lambda: budget.held == 1_000_000)
    status, reply = await server.post("/generate", {"inputs": "x" * 60_000})
    assert status == 429
    assert "--max_client_mb" in reply["message"]
    assert (await server.get("/liveness"))[0] == 200
    for writer in writers:
        writer.close()
    await server.settle(lambda: budget.held == 0)


def test_a_budget_counts_for_its_parent_and_is_all_or_nothing() -> None:
    total = Budget(10)
    first, second = Budget(8, total), Budget(8, total)
    first.charge(7)
    for budget, num_bytes in ((first, 2), (second, 4)):
        with pytest.raises(OverloadedError, match="--max_client_mb"):
            budget.charge(num_bytes)
    assert (total.held, first.held, second.held) == (7, 7, 0)
    second.charge(3)
    first.release(7)
    assert (total.held, first.held, second.held) == (3, 0, 3)


async def test_a_flood_is_answered_while_its_connections_are_accepted(start: Any) -> None:
    server = await start(max_queued_requests=1, running_max_req_size=1)
    server.engine.manual = True
    waiting = [asyncio.create_task(server.post("/generate", {"inputs": "x"})) for _ in range(2)]
    await server.engine.submitted(2)
    connections = server.frontend.connections
    num_open = len(connections.open)
    assert b"Connection: close" not in await server.exchange(post(b"/generate"))
    assert connections.is_refusing()
    with contextlib.ExitStack() as stack:
        flood = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port(server))))
            for _ in range(100)
        ]  # the server's loop, which is this thread's, runs only after these lines
        for client in flood:
            client.sendall(post(b"/generate"))
        await asyncio.sleep(0.1)
        for client in flood:
            reply = client.recv(10_000)
            assert reply.startswith(b"HTTP/1.1 429")
            assert b"Connection: close" in reply
            assert client.recv(1) == b""
        silent = stack.enter_context(socket.create_connection(("127.0.0.1", port(server))))
        await server.settle(lambda: len(connections.open) == num_open + 1)
        silent.sendall(PROBE)
        await asyncio.sleep(0.1)
        assert silent.recv(100).startswith(b"HTTP/1.1 200")
        probe = stack.enter_context(socket.create_connection(("127.0.0.1", port(server))))
        probe.sendall(PROBE)
        await asyncio.sleep(0.1)
        assert probe.recv(100).startswith(b"HTTP/1.1 200"), "its bytes were read early"
    for submit in server.engine.submits:
        server.engine.finish(submit, "stop")
    assert [status for status, _ in await asyncio.gather(*waiting)] == [200, 200]
