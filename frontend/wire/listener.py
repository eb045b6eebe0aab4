"""The HTTP port: accepts connections in small groups, so that no burst of them blocks the loop.

While posts are being refused, the first bytes of a connection are awaited here. If they are a whole
post that is refused, it is answered and the connection is closed. That takes a few system calls and
keeps nothing. All other connections are handed over to a `Connection`.
"""

import asyncio
import contextlib
import select
import socket
import ssl

from .connection import Connection, Connections

_BACKLOG = 4096
_ACCEPTS_PER_TURN = 256
_AGAIN_S = 0.1  # after a failure for lack of files or memory
_FIRST_BYTES = 64 << 10
_MAX_SILENT = 8192  # connections whose first bytes are awaited here,
_SILENT_S = 1.0  # for so long
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
        self._silent: dict[int, socket.socket] = {}  # by file descriptor
        self._sweeper: asyncio.TimerHandle | None = None  # runs while there are some
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
        self._hand_over()
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
                if self._tls is None and self._connections.is_refusing():
                    self._look(client)
                else:
                    self._take(client)

    def _look(self, client: socket.socket) -> None:
        """Refuse the client, or take it, or wait for its first bytes."""
        try:
            data = client.recv(_FIRST_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if len(self._silent) < _MAX_SILENT:
                self._await_bytes(client)
            else:
                self._take(client)
            return
        reply = self._connections.refusal(data, closes=True)
        if reply:
            _send_last(client, reply)
        elif data:
            self._take(client, data)
        else:
            client.close()

    def _await_bytes(self, client: socket.socket) -> None:
        fd = client.fileno()
        self._silent[fd] = client
        self._loop.add_reader(fd, self._on_bytes, fd)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SILENT_S, self._hand_over)

    def _on_bytes(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        with contextlib.suppress(OSError):
            self._look(self._silent.pop(fd))

    def _hand_over(self) -> None:
        """Take all clients that are still silent, so that they get the limits of `Connection`."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        while self._silent:
            fd, client = self._silent.popitem()
            self._loop.remove_reader(fd)
            with contextlib.suppress(OSError):
                self._take(client)

    def _take(self, client: socket.socket, data: bytes = b"") -> None:
        """Begin to serve a client that has sent `data`."""
        connections = self._connections
        if len(connections.open) + len(self._starting) + len(self._silent) >= connections.max_open:
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
