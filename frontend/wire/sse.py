"""Server-sent events: one reply that stays open, sent to a client that may be slow or gone.

`stream_reply` is the loop of every streaming route; a `Writer` knows the wire format. A client
that does not read makes `EventStream.write` wait. `connection.py` cuts such connections, which
cancels the handler and so aborts its sequences.
"""

from typing import Protocol, TypeVar

from aiohttp import web

from ...shared.errors import HttpError
from ..context import CONTEXT
from ..engine.job import Job, Reply, Stream
from .body import encode_json

KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
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
    stream = EventStream(job.request, writer)
    data = writer.opening
    while job.generation.is_open:
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

    def __init__(self, request: web.Request, writer: Writer[S]) -> None:
        self.response = web.StreamResponse(headers=_HEADERS)
        self._request = request
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
        if not self.response.prepared:
            await self.response.prepare(self._request)
        await self.response.write(data)

    async def end(self) -> None:
        """End the response."""
        await self.response.write_eof()

    async def fail(self, error: HttpError) -> None:
        """End a stream that breaks. No [DONE] follows."""
        await self.write(self._format_error(error))
        await self.end()


def error_json(error: HttpError) -> bytes:
    """The JSON of an error inside a stream, as OpenAI's and LightLLM's routes send it."""
    body = {"error": {"message": str(error), "type": "server_error", "code": "stream_error"}}
    return encode_json(body)
