"""Server-sent events: one reply that stays open, sent to a client that may be slow or gone.

`stream_reply` is the loop of every streaming route; a `Writer` knows the wire format. A client
that does not read makes `EventStream.write` wait; `Stalls` cuts such connections, which cancels
the handler and so aborts its sequences.
"""

import asyncio
import time
from typing import Protocol, TypeVar

from aiohttp import web

from ...shared.errors import HttpError
from ..context import CONTEXT
from ..engine.job import Job, Reply, Stream
from .body import encode_json

WRITE_STALL_S = 30.0
KEEP_ALIVE = b": keep-alive\n\n"
S = TypeVar("S", bound=Stream)


class Writer(Protocol[S]):
    """The wire format of one streamed reply. Each method returns whole events, or b""."""

    opening: bytes  # the events before anything was generated; sent with the first output
    keep_alive: bytes  # sent when nothing was generated for a long time

    def add(self, reply: Reply[S]) -> bytes:
        """The events for new output of one sequence."""
        ...

    def end(self) -> bytes:
        """The events after all sequences have ended."""
        ...

    def fail(self, error: HttpError) -> bytes:
        """The last event of a stream that breaks. No other event follows."""
        ...


async def stream_reply(job: Job[S], writer: Writer[S]) -> web.StreamResponse:
    """Write the replies of a job until all have ended. One write sends everything that arrived
    together."""
    stream = EventStream(job.request, job.frontend.stalls, writer)
    data = writer.opening
    while job.is_open:
        replies = await job.receive()
        data += b"".join(map(writer.add, replies)) if replies else writer.keep_alive
        await stream.write(data)
        data = b""
    await stream.write(writer.end())
    await stream.end()
    return stream.response


class EventStream:
    """One open reply. Headers are sent with the first write, so that a request that fails before
    its first token still gets a plain error reply. A later error is the last event."""

    def __init__(self, request: web.Request, stalls: "Stalls", writer: Writer[S]) -> None:
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        self.blocked_since: float | None = None
        self._request = request
        self._stalls = stalls
        self._format_error = writer.fail
        request[CONTEXT].stream = self

    @property
    def is_open(self) -> bool:
        """Whether headers have been sent, so that the reply must be a stream."""
        return self.response.prepared

    async def write(self, data: bytes) -> None:
        """Send whole events, if there are any. Waits while the client does not read."""
        if not data:
            return
        self.blocked_since = time.monotonic()
        if not self.response.prepared:
            self._stalls.streams.add(self)
            await self.response.prepare(self._request)
        await self.response.write(data)
        self.blocked_since = None

    async def end(self) -> None:
        """End the response."""
        self.blocked_since = time.monotonic()
        await self.response.write_eof()
        self.blocked_since = None

    async def fail(self, error: HttpError) -> None:
        """End a stream that breaks. No [DONE] follows."""
        await self.write(self._format_error(error))
        await self.end()

    def cut(self) -> None:
        """Drop the connection; aiohttp then cancels the handler."""
        if self._request.transport is not None:
            self._request.transport.abort()

    def close(self) -> None:
        """Stop watching this stream: its handler is done."""
        self._stalls.streams.discard(self)


class Stalls:
    """Watches the open streams for clients that stopped reading."""

    def __init__(self, limit_s: float = WRITE_STALL_S) -> None:
        self.streams: set[EventStream] = set()
        self.limit_s = limit_s
        self.num_cut = 0

    def check(self, now: float) -> None:
        """Cut the streams whose write has been waiting for longer than the limit."""
        for stream in list(self.streams):
            if stream.blocked_since is not None and now - stream.blocked_since > self.limit_s:
                self.streams.discard(stream)
                self.num_cut += 1
                stream.cut()

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self.limit_s / 2))
            self.check(time.monotonic())


def error_json(error: HttpError) -> bytes:
    """The JSON of an error inside a stream, as OpenAI's and LightLLM's routes send it."""
    body = {"error": {"message": str(error), "type": "server_error", "code": "stream_error"}}
    return encode_json(body)
