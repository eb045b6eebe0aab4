"""Server-sent events: one reply that stays open, written to a client that may be slow or gone.

A client that does not read makes `write` wait; `Stalls` cuts such connections, which cancels the
handler and so aborts its sequences. Framing of both interfaces is in `generate.py`/`openai.py`.
"""

import asyncio
import time
from collections.abc import Callable

from aiohttp import web

from ...shared.errors import HttpError
from ..context import CONTEXT
from .body import encode_json

WRITE_STALL_S = 30.0
KEEP_ALIVE = b": keep-alive\n\n"


class EventStream:
    """One open reply. Headers go out with the first write, so that a request that fails before
    its first token can still get a plain error reply. An error later is the last event:
    `format_error`'s, or by default OpenAI's error object after `prefix`."""

    def __init__(
        self,
        request: web.Request,
        stalls: "Stalls",
        prefix: bytes,
        format_error: Callable[[HttpError], bytes] | None = None,
    ) -> None:
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
        self._prefix = prefix
        self._format_error = format_error or self._error_object
        request[CONTEXT].stream = self

    @property
    def is_open(self) -> bool:
        """Whether the client has been promised a stream."""
        return self.response.prepared

    async def write(self, data: bytes) -> None:
        """Send whole events. Waits while the client does not read."""
        self.blocked_since = time.monotonic()
        if not self.response.prepared:
            self._stalls.streams.add(self)
            await self.response.prepare(self._request)
        await self.response.write(data)
        self.blocked_since = None

    async def end(self) -> None:
        """Nothing more to say."""
        self.blocked_since = time.monotonic()
        await self.response.write_eof()
        self.blocked_since = None

    async def fail(self, error: HttpError) -> None:
        """Last event of a stream that breaks. No [DONE] follows."""
        await self.write(self._format_error(error))
        await self.end()

    def _error_object(self, error: HttpError) -> bytes:
        body = {"error": {"message": str(error), "type": "server_error", "code": "stream_error"}}
        return self._prefix + encode_json(body) + b"\n\n"

    def cut(self) -> None:
        """Drop the connection; aiohttp then cancels the handler."""
        if self._request.transport is not None:
            self._request.transport.abort()

    def close(self) -> None:
        """Stop watching it: the handler is done."""
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
