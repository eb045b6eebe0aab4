"""10,000 posts at once to a server whose queue is full: how long does a refusal take?

The time is from sending a request's bytes to the first byte of its answer. The client shares the
cores with the server, so the same flood is also sent to a plain uvloop server that answers any
bytes at once with a constant. That floor is the best that these cores can show.
"""

import contextlib
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_IDLE_S = 20.0  # after so long without an event the rest counts as hung

_FLOOR = """
import asyncio, sys, uvloop

REPLY = b"HTTP/1.1 429 Refused\\r\\nContent-Length: 2\\r\\n\\r\\n{}"

class Floor(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(REPLY)

async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Floor, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()

uvloop.run(main())
"""


@dataclass
class Flood:
    """Outcome of one flood. Times are in seconds, from sending to the first byte."""

    count: int
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)  # 0: closed without an answer

    @property
    def hung(self) -> int:
        """Requests that neither were answered nor closed."""
        return self.count - self.statuses.total()

    def quantile_ms(self, share: float) -> float:
        """A quantile of the times."""
        times = sorted(self.times) or [0.0]
        return times[min(len(times) - 1, int(len(times) * share))] * 1e3


class _Client:
    """Sends `count` copies of `request`, each on a connection of its own, `at_once` at a time.
    One thread with epoll: a loop in Python would delay the answers that it measures."""

    def __init__(self, port: int, request: bytes, count: int, at_once: int) -> None:
        self._address = ("127.0.0.1", port)
        self._request = request
        self._at_once = at_once
        self._left = count
        self._poll = select.epoll()
        self._open: dict[int, tuple[socket.socket, float]] = {}
        self.flood = Flood(count)

    def run(self) -> Flood:
        begun = time.perf_counter()
        while self._open or self._left:
            while self._left and len(self._open) < self._at_once:
                self._connect()
            events = self._poll.poll(_IDLE_S)
            now = time.perf_counter()
            if not events:
                break
            for fd, event in events:
                self._on_event(fd, event, now)
        self.flood.seconds = time.perf_counter() - begun
        for sock, _ in self._open.values():
            sock.close()
        self._poll.close()
        return self.flood

    def _connect(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect(self._address)
        self._open[sock.fileno()] = (sock, 0.0)
        self._poll.register(sock, select.EPOLLOUT)
        self._left -= 1

    def _on_event(self, fd: int, event: int, now: float) -> None:
        sock, sent_at = self._open[fd]
        try:
            if not sent_at and not event & (select.EPOLLERR | select.EPOLLHUP):
                self._open[fd] = (sock, time.perf_counter())
                sock.send(self._request)
                self._poll.modify(fd, select.EPOLLIN)
                return
            answer = sock.recv(1 << 16)
        except OSError:
            answer = b""
        if answer:
            self.flood.times.append(now - sent_at)
        self.flood.statuses[int(answer[9:12]) if answer else 0] += 1
        del self._open[fd]
        self._poll.unregister(fd)
        sock.close()


def flood(port: int, request: bytes, count: int, at_once: int) -> Flood:
    """Send `count` requests, `at_once` at a time, and wait for the first bytes of all answers."""
    return _Client(port, request, count, at_once).run()


@contextlib.contextmanager
def floor_server() -> Iterator[int]:
    """A server that answers at once; its port."""
    with subprocess.Popen([sys.executable, "-c", _FLOOR], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()
