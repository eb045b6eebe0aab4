"""Anthropic's routes: a writer of what `chat.py` gives, in content blocks and named events.

A reply is a list of blocks: thinking, text, tool_use, in the order in which the model wrote them.
In a stream each block is opened, filled by deltas and closed; `message_delta` says at the end why
it ended and what it cost. Signatures of thinking blocks are there because clients expect them.
"""

import hashlib
import secrets
from collections.abc import Iterator

import msgspec
from aiohttp import web

from ..chat.blocks import Block, run_blocks
from ..chat.chat import ChatJob, News, Usage, open_chat, prompt_ids
from ..context import Frontend
from ..parsers.deltas import CallArguments, CallStart, Content, Delta, Reasoning
from ..wire.body import encode_json, reply
from ..wire.errors import Json, anthropic_event
from ..wire.schema import decode_body, spelled
from ..wire.sse import EventStream
from .anthropic_request import CountTokensBody, MessagesBody, anthropic_chat

_NAMES = {
    "stop": "stop_sequences",
    r"tools\[(\d+)\]\.function\.parameters": r"tools[\1].input_schema",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
}
_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use"}  # others: "max_tokens"


async def messages(frontend: Frontend, request: web.Request, data: bytes) -> web.StreamResponse:
    """POST /v1/messages: the next message of a conversation, in Anthropic's format."""
    body = decode_body(data, MessagesBody)
    shows_thinking = body.thinking is None or body.thinking.display != "omitted"
    with spelled(_NAMES):
        opened = await open_chat(frontend, request, anthropic_chat(body, frontend.facts))
    with opened as job:
        if body.stream:
            return await _stream(frontend, request, job, StreamWriter(body.model, shows_thinking))
        blocks, stop = await run_blocks(job), job.stop_string(0)
        return reply(
            {
                **_head(body.model),
                "content": [_block(block, shows_thinking) for block in blocks.blocks],
                "stop_reason": _stop_reason(blocks.finish_reason, stop),
                "stop_sequence": stop,
                "usage": _usage(job.usage()),
            }
        )


async def count_tokens(frontend: Frontend, request: web.Request, data: bytes) -> web.StreamResponse:
    """POST /v1/messages/count_tokens: the length of the prompt that /v1/messages would run."""
    body = decode_body(data, CountTokensBody)
    with spelled(_NAMES):
        ids = await prompt_ids(frontend, anthropic_chat(body, frontend.facts))
    return reply({"input_tokens": len(ids)})


async def _stream(
    frontend: Frontend, request: web.Request, job: ChatJob, writer: "StreamWriter"
) -> web.StreamResponse:
    """One write takes everything that came together."""

    stream = EventStream(request, frontend.stalls, b"", lambda e: _event(anthropic_event(e)))
    opening = [*writer.start(job.usage())]
    while job.is_open:
        received = await job.receive()
        events, opening = opening, []
        for news in received:
            events += writer.news(news)
        if not received:
            events.append({"type": "ping"})
        if events:
            await stream.write(b"".join(map(_event, events)))
    reason, stop = writer.finish_reason, job.stop_string(0)
    events = [*writer.end(_stop_reason(reason, stop), stop, job.usage())]
    await stream.write(b"".join(map(_event, events)))
    await stream.end()
    return stream.response


class StreamWriter:
    """The events of one message."""

    def __init__(self, model: str, shows_thinking: bool = True) -> None:
        self.finish_reason = "stop"
        self._model, self._shows_thinking = model, shows_thinking
        self._index = -1  # of the block that is open, or was last
        self._kind: str | None = None  # of the open block
        self._thought = hashlib.sha256()

    def start(self, usage: Usage) -> Iterator[Json]:
        """Before anything was generated. What the prefix cache holds is not known yet."""
        message = {**_head(self._model), "content": [], "stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": {**message, "usage": _usage(usage)}}
        yield {"type": "ping"}

    def news(self, news: News) -> Iterator[Json]:
        """What a piece of the reply adds."""
        for delta in news.deltas:
            yield from self._delta(delta)
        if news.finish_reason is not None:
            self.finish_reason = news.finish_reason

    def end(self, stop_reason: str, stop_sequence: str | None, usage: Usage) -> Iterator[Json]:
        """What closes the stream."""
        yield from self._close()
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        yield {"type": "message_delta", "delta": delta, "usage": _usage(usage)}
        yield {"type": "message_stop"}

    def _delta(self, delta: Delta) -> Iterator[Json]:
        match delta:
            case Reasoning(text):
                if self._kind != "thinking":
                    self._thought = hashlib.sha256()
                    yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
                self._thought.update(text.encode())
                if self._shows_thinking:
                    yield self._piece({"type": "thinking_delta", "thinking": text})
            case Content(text):
                if self._kind != "text":
                    yield from self._open({"type": "text", "text": ""})
                yield self._piece({"type": "text_delta", "text": text})
            case CallStart(_, call_id, name):
                yield from self._open(_tool_use(call_id, name, {}))
            case CallArguments(_, text):
                yield self._piece({"type": "input_json_delta", "partial_json": text})

    def _open(self, block: Json) -> Iterator[Json]:
        yield from self._close()
        self._index, self._kind = self._index + 1, block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _piece(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[Json]:
        if self._kind == "thinking":
            yield self._piece({"type": "signature_delta", "signature": self._thought.hexdigest()})
        if self._kind is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._kind = None


def _event(data: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), encode_json(data))


def _block(block: Block, shows_thinking: bool) -> Json:
    if block.call is not None:
        return _tool_use(block.call.id, block.call.name, _input(block.text))
    if block.kind is Content:
        return {"type": "text", "text": block.text}
    signature = hashlib.sha256(block.text.encode()).hexdigest()
    shown = block.text if shows_thinking else ""
    return {"type": "thinking", "thinking": shown, "signature": signature}


def _head(model: str) -> Json:
    message_id = f"msg_{secrets.token_hex(12)}"
    return {"id": message_id, "type": "message", "role": "assistant", "model": model}


def _tool_use(call_id: str, name: str, arguments: Json) -> Json:
    tool_id = "toolu_" + call_id.removeprefix("call_")
    return {"type": "tool_use", "id": tool_id, "name": name, "input": arguments}


def _input(arguments: str) -> Json:
    """A call's arguments; {} for one that was cut off, whose stop_reason says so."""
    try:
        return msgspec.json.decode(arguments, type=dict)
    except (msgspec.MsgspecError, RecursionError):
        return {}


def _stop_reason(finish_reason: str, stop_string: str | None) -> str:
    if stop_string is not None:
        return "stop_sequence"
    return _STOP_REASONS.get(finish_reason, "max_tokens")


def _usage(usage: Usage) -> Json:
    """Anthropic's counts: input tokens are those that the cache did not hold."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
    }
