"""Clients that stop reading are cut, and their requests with them."""

import asyncio
import socket
from typing import Any

import pytest
from glimmer.frontend.wire.sse import Stalls
from glimmer.shared.messages import TokenLogprob, TokenRow, Tokens


async def test_a_client_that_stops_reading_is_cut_and_aborted(start: Any) -> None:
    server = await start()
    server.engine.manual = True
    stalls = server.frontend.stalls
    stalls.limit_s = 0.2
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    body = b'{"inputs": "x", "parameters": {"max_new_tokens": 500}}'
    head = b"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    await loop.sock_sendall(sock, head + body)
    submit = (await server.engine.submitted())[0]
    watch = asyncio.create_task(stalls.run())
    async with asyncio.timeout(20):
        for _ in range(499):  # far more than the buffers between here and there hold
            server.engine.send(big_row(submit))
            await asyncio.sleep(0)
        await server.settle(lambda: stalls.num_cut == 1)
        await server.engine.until(lambda: server.engine.aborted_ids == [submit.request_id])
    watch.cancel()
    assert stalls.streams == set()
    sock.close()
    server.engine.manual = False
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200


def big_row(submit: Any) -> Any:
    top = [(n, -1.0) for n in range(400)]
    return Tokens([TokenRow(submit.request_id, [5], [TokenLogprob(5, -1.0, 1, top)])])


class Stream:
    def __init__(self, blocked_since: float | None) -> None:
        self.blocked_since = blocked_since
        self.was_cut = False

    def cut(self) -> None:
        self.was_cut = True


@pytest.mark.parametrize(("blocked_since", "cut"), [(None, False), (71.0, False), (69.0, True)])
def test_only_streams_that_waited_longer_than_the_limit_are_cut(
    blocked_since: float | None, cut: bool
) -> None:
    stalls, stream = Stalls(limit_s=30.0), Stream(blocked_since)
    stalls.streams.add(stream)  # type: ignore[arg-type]
    stalls.check(100.0)
    assert stream.was_cut == cut
    assert (stream in stalls.streams) == (not cut)
