"""OpenAI's /v1/responses, stateless: a writer of what `chat.py` gives, in output items."""

import itertools

from aiohttp import web

from ...shared.errors import HttpError
from ..chat.chat import ChatJob, open_chat
from ..context import Frontend
from ..wire.body import reply
from ..wire.schema import decode_body, spelled
from ..wire.sse import EventStream
from .responses_request import ResponsesBody, responses_chat
from .responses_writer import ResponseWriter

_NAMES = {
    "messages": "input",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


async def responses(frontend: Frontend, request: web.Request, data: bytes) -> web.StreamResponse:
    """POST /v1/responses: the next items of a conversation. Nothing is stored."""
    body = decode_body(data, ResponsesBody)
    with spelled(_NAMES):
        opened = await open_chat(frontend, request, responses_chat(body, frontend.facts))
    with opened as job:
        writer = ResponseWriter(body, frontend.tokenizer.vocabulary)
        if body.stream:
            return await _stream(frontend, request, job, writer)
        while job.is_open:
            for news in await job.receive():
                for _ in writer.news(news):
                    pass  # the items are what counts here
        for _ in writer.end(job.usage()):
            pass
        return reply(writer.response)


async def _stream(
    frontend: Frontend, request: web.Request, job: ChatJob, writer: ResponseWriter
) -> web.StreamResponse:
    """One write takes everything that came together."""

    def format_error(error: HttpError) -> bytes:
        return b"".join(writer.fail(str(error), job.usage()))

    stream = EventStream(request, frontend.stalls, b"", format_error)
    opening = [*writer.start()]
    while job.is_open:
        received = await job.receive()
        events, opening = opening, []
        events += itertools.chain.from_iterable(map(writer.news, received))
        if events or not received:
            await stream.write(b"".join(events) or b": keep-alive\n\n")
    await stream.write(b"".join(writer.end(job.usage())))
    await stream.end()
    return stream.response
