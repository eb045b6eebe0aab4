"""Client connections: how much each may make this process hold, and for how long.

aiohttp speaks HTTP. A `Connection` stands between it and the socket: it gathers the head of a
request before aiohttp gets it, so that a client without a complete head costs little. It refuses
heads that are too large, answers posts at once while the server is full, and notes when its client
does not read. `Connections` starts requests in small groups and cuts clients that take too long.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import cast

from ...shared.errors import OverloadedError

MAX_HEAD = 64 << 10  # bytes of a request line and all headers; gateways add long tokens
HEAD_END = b"\r\n\r\n"
_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n"
_STARTS_PER_TURN = 16  # posts that start in one turn of the event loop; others wait for the next
_CHECKS_PER_TURN = 1000
_REFUSING_S = 1.0  # a refused post is a sign of more to come, for so long
_MIN_READ = 64 << 10  # bytes that a client must read within `stall_s`, if so many wait for it


class Budget:
    """Bytes that are held for `who`, up to `limit`. A `parent` counts them as well."""

    def __init__(
        self, limit: int, parent: "Budget | None" = None, who: str = "the requests of all"
    ) -> None:
        self.limit, self.held, self._parent, self._who = limit, 0, parent, who

    def move(self, parent: "Budget") -> None:
        """Let `parent` count all that is held, in place of the parent before. Raises
        OverloadedError, and changes nothing, if that is too much for it."""
        if parent is self._parent:
            return
        parent.charge(self.held)
        if self._parent is not None:
            self._parent.release(self.held)
        self._parent = parent

    def charge(self, num_bytes: int) -> None:
        """Raises OverloadedError, and counts nothing, when a limit would be exceeded."""
        if self.held + num_bytes > self.limit:
            raise self._exceeded()
        if self._parent is not None:
            self._parent.charge(num_bytes)
        self.held += num_bytes

    def release(self, num_bytes: int) -> None:
        """Give back what was charged."""
        self.held -= num_bytes
        if self._parent is not None:
            self._parent.release(num_bytes)

    def _exceeded(self) -> OverloadedError:
        limit_mb = f"{self.limit / (1 << 20):g} MB"
        return OverloadedError(f"{self._who} hold {limit_mb} already (--max_client_mb)", None, 1.0)


class Expects(Enum):
    """The part of a request that a connection receives next."""

    HEAD = 1
    BODY = 2
    NOTHING = 3  # a request is being answered


@dataclass
class Limits:
    """How long a client may take, in seconds."""

    stall_s: float = 30.0  # to read `_MIN_READ` bytes of a reply, or the last ones
    head_s: float = 15.0  # to send a complete head
    idle_s: float = 75.0  # to send the first byte; aiohttp limits the time between two requests


class Connection(asyncio.Protocol):
    """One client's connection. `budget` counts what is held for it. `early` are bytes that were
    read before it was made."""

    def __init__(self, connections: "Connections", early: bytes = b"") -> None:
        total = connections.budget
        self.budget = Budget(total.limit // 4, total, "this client's requests")
        self.is_new = True  # aiohttp does not know it yet
        self._connections = connections
        self._early = early
        self._handler: asyncio.Protocol | None = None  # aiohttp's
        self._expects = Expects.HEAD
        self._since = connections.now()  # it opened, or the present wait began
        self._head = b""  # of the next request, while it is not complete
        self._num_early = 0  # bytes of later requests while one is being answered
        self._num_unread = 0  # bytes that wait for the client to read; 0: it reads
        self._was_closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Watch it."""
        self.transport = cast(asyncio.Transport, transport)
        self._connections.open.add(self)
        if self._early:
            early, self._early = self._early, b""
            self.data_received(early)

    def connection_lost(self, exc: Exception | None) -> None:
        """Free what waits here. aiohttp cancels the handler of the request."""
        self._connections.open.discard(self)
        self.budget.release(len(self._head) + self._num_unread)
        self._head, self._num_unread = b"", 0
        if self._handler is not None:
            self._handler.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass data on to aiohttp, heads only as a whole."""
        if self._expects is Expects.HEAD:
            self._gather(self._head + data)
        elif self._expects is Expects.NOTHING and self._num_early + len(data) > MAX_HEAD:
            self.cut()
        else:
            self._num_early += len(data)
            self.pass_on(data)

    def _gather(self, data: bytes) -> None:
        """Start a request when its head is complete. Bytes that begin no request go to aiohttp,
        which refuses them."""
        end = data.find(HEAD_END)
        if max(end, 0 if end >= 0 else len(data)) > MAX_HEAD:
            self.transport.write(_TOO_LONG)
            self.transport.close()
        elif end < 0 and data[:1].isalpha():
            self._wait_for_head(data)
        else:
            self._take_head()
            self._expects = Expects.BODY
            self._connections.start(self, data)

    def _wait_for_head(self, data: bytes) -> None:
        if not self._take_head():
            self._since = self._connections.now()
        self._head = data if self._charge(len(data)) else b""

    def _take_head(self) -> bytes:
        head, self._head = self._head, b""
        self.budget.release(len(head))
        return head

    def pass_on(self, data: bytes) -> None:
        """Give bytes to aiohttp."""
        if self._handler is None:
            self._handler, self.is_new = self._connections.make_handler(), False
            self._handler.connection_made(self.transport)
        self._handler.data_received(data)

    def answer(self, reply: bytes) -> None:
        """Answer a request that aiohttp does not know of."""
        self._expects, self._since = Expects.HEAD, self._connections.now()
        self.transport.write(reply)

    def expect(self, part: Expects) -> None:
        """aiohttp's request begins to read its body, is answered, or has ended. A client that did
        not wait for the reply before may have sent the body already."""
        self._expects, self._num_early = part, 0
        if part is Expects.HEAD and self._connections.is_draining:  # once aiohttp has replied
            asyncio.get_running_loop().call_soon(self.close_if_idle)
        if self._head and part is Expects.BODY:
            self.pass_on(self._take_head())

    def pause_writing(self) -> None:
        """The client does not read, or not fast enough."""
        self._since = self._connections.now()
        self._num_unread = self._charge(self.transport.get_write_buffer_size())
        if self._handler is not None:
            self._handler.pause_writing()

    def resume_writing(self) -> None:
        """The client has read most of it."""
        self.budget.release(self._num_unread)
        self._num_unread = 0
        if self._handler is not None:
            self._handler.resume_writing()

    def check(self, now: float, limits: Limits) -> None:
        """Cut the connection if its client takes too long."""
        if self.transport.is_closing() and not self._was_closing:
            self._was_closing, self._since = True, now
        if now - self._since > self._limit_s(limits) and not self._has_read():
            self.cut()

    def _limit_s(self, limits: Limits) -> float:
        if self._num_unread or self._was_closing:
            return limits.stall_s
        if self._head:
            return limits.head_s
        return limits.idle_s if self.is_new else math.inf

    def _has_read(self) -> bool:
        """Whether the client has read enough of what waited for it. If so, it may go on."""
        num_unread = self.transport.get_write_buffer_size()
        num_read = self._num_unread - num_unread
        if num_read < _MIN_READ:
            return False
        self.budget.release(num_read)
        self._num_unread, self._since = num_unread, self._connections.now()
        return True

    def close_if_idle(self) -> None:
        """Close it if no request and no part of one is here."""
        if self._expects is Expects.HEAD and not self._head and not self._num_unread:
            self.transport.close()

    def cut(self) -> None:
        """Drop the connection."""
        self._connections.num_cut += 1
        self.transport.abort()

    def _charge(self, num_bytes: int) -> int:
        """`num_bytes`; 0 if they are too many: then the connection is cut."""
        try:
            self.budget.charge(num_bytes)
        except OverloadedError:
            self.cut()
            return 0
        return num_bytes


class Connections:
    """All connections of this process. `max_bytes` may be held for them, a quarter for one."""

    def __init__(self, max_bytes: int) -> None:
        self.budget = Budget(max_bytes)
        self.limits = Limits()
        self.open: set[Connection] = set()
        self.num_cut = 0
        self.max_open = 1 << 20
        self.num_refused = 0
        self.is_draining = False
        self._waiting: deque[tuple[Connection, bytes]] = deque()  # to start in the next turns
        self._num_started = 0  # in this turn of the event loop
        self._refused_at = -math.inf

    def serve(
        self,
        make_handler: Callable[[], asyncio.Protocol],
        refuse: Callable[[bytes, int, bool], bytes],
    ) -> None:
        """Must be called before the first connection. `make_handler` makes aiohttp's side of one.
        `refuse` gets the first bytes of a post, the number of posts that wait to be started, and
        whether its connection will be closed. It returns a whole reply, or b"" if the post must be
        handled."""
        self.make_handler, self._refuse = make_handler, refuse
        self.now = asyncio.get_running_loop().time

    def is_refusing(self) -> bool:
        """Whether a post was refused a moment ago."""
        return self.now() - self._refused_at < _REFUSING_S

    def refusal(self, data: bytes, closes: bool) -> bytes:
        """The reply to a post that is refused; b"" for any other data."""
        if not data.startswith(b"POST "):
            return b""
        reply = self._refuse(data, len(self._waiting), closes)
        if reply:
            self._refused_at = self.now()
        return reply

    def start(self, connection: Connection, data: bytes) -> None:
        """Begin a request whose head is complete. Posts begin in small groups, so that others, such
        as probes, wait for one group and not for a flood."""
        if not data.startswith(b"POST "):
            connection.pass_on(data)
        elif connection.is_new and (reply := self.refusal(data, closes=False)):
            connection.answer(reply)
        else:
            if not self._num_started:
                asyncio.get_running_loop().call_soon(self._next_turn)
            self._num_started += 1
            if self._num_started <= _STARTS_PER_TURN:
                connection.pass_on(data)
            else:
                connection.transport.pause_reading()
                self._waiting.append((connection, data))

    def _next_turn(self) -> None:
        count = self._num_started = min(len(self._waiting), _STARTS_PER_TURN)
        for _ in range(count):
            connection, data = self._waiting.popleft()
            if not connection.transport.is_closing():
                connection.transport.resume_reading()
                connection.pass_on(data)
        if count:
            asyncio.get_running_loop().call_soon(self._next_turn)

    async def run(self) -> None:
        """Check all connections about once a second, until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self.limits.stall_s / 2))
            for n, connection in enumerate(list(self.open), 1):
                connection.check(self.now(), self.limits)
                if n % _CHECKS_PER_TURN == 0:
                    await asyncio.sleep(0)

    def close_idle(self) -> None:
        """Close every connection as soon as it has no request. A client that keeps connections
        open for later requests then sends those elsewhere."""
        self.is_draining = True
        for connection in list(self.open):
            connection.close_if_idle()

    def close(self) -> None:
        """Close the connections that no request has begun on."""
        for connection in list(self.open):
            if connection.is_new:
                connection.transport.close()
