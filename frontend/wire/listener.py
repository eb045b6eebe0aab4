"""The HTTP port: accepts connections in small groups, so that no burst of them blocks the loop.

While posts are being refused, one that has arrived whole with its connection is answered here, and
its connection is closed. That takes five system calls and keeps nothing.
"""

import asyncio
import contextlib
import select
import socket
import ssl

from .connection import Connection, Connections

_BACKLOG = 4096
_ACCEPTS_PER_TURN = 64
_AGAIN_S = 0.1  # after a failure for lack of files or memory
_FIRST_BYTES = 64 << 10
_NO_ROOM = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)


class Listener:
    """A bound socket on which connections are accepted until `close`."""

    def __init__(
        self, bound: socket.socket, connections: Connections, tls: ssl.SSLContext | None
    ) -> None:
        self._socket, self._connections, self._tls = bound, connections, tls
        self._loop = asyncio.get_running_loop()
        self._starting: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        bound.listen(_BACKLOG)
        self._resume()

    def close(self) -> None:
        """Accept the connections that clients have made, which the kernel would reset otherwise,
        and no more."""
        if self._socket.fileno() < 0:
            return
        arrivals = select.poll()
        arrivals.register(self._socket, select.POLLIN)
        for _ in range(_BACKLOG // _ACCEPTS_PER_TURN):
            if arrivals.poll(0):
                self._accept_some()
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _resume(self) -> None:
        self._timer = None
        self._loop.add_reader(self._socket, self._accept_some)

    def _accept_some(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                client, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # too many open files, or no memory
                self._loop.remove_reader(self._socket)
                self._timer = self._loop.call_later(_AGAIN_S, self._resume)
                return
            with contextlib.suppress(OSError):  # the client has gone
                self._take(client)

    def _take(self, client: socket.socket) -> None:
        """Answer the client at once, or begin to serve it."""
        connections = self._connections
        data = b""
        if self._tls is None and connections.is_refusing():
            with contextlib.suppress(BlockingIOError):
                data = client.recv(_FIRST_BYTES, socket.MSG_DONTWAIT)
            reply = connections.refusal(data, closes=True)
            if reply:
                _send_last(client, reply)
                return
        if len(connections.open) + len(self._starting) >= connections.max_open:
            connections.num_refused += 1
            _send_last(client, _NO_ROOM)
            return
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._serve(client, Connection(connections, data)))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _serve(self, client: socket.socket, connection: Connection) -> None:
        with contextlib.suppress(OSError):  # no TLS, or the client has gone
            await self._loop.connect_accepted_socket(lambda: connection, client, ssl=self._tls)


def _send_last(client: socket.socket, reply: bytes) -> None:
    with client:
        client.send(reply, socket.MSG_DONTWAIT)
