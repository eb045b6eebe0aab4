"""Anthropic's routes: writes chat replies as content blocks and named events.

A reply is a list of blocks: thinking, text, tool_use, in the order in which the model wrote them.
In a stream each block is opened, filled by deltas and closed; at the end `message_delta` has the
stop reason and the token counts. Signatures of thinking blocks are only there because clients
expect them.
"""

import hashlib
import secrets
from collections.abc import Iterator
from functools import partial

import msgspec
from aiohttp import web

from ...shared.errors import HttpError
from ..chat.chat import ChatStream, chat_finish_reason, open_chat, prompt_ids
from ..context import Frontend
from ..engine.job import Job, Reply, Usage
from ..parsers.deltas import CallArguments, CallStart, Content, Delta, Reasoning
from ..wire.body import Payload, encode_json, json_reply, json_response
from ..wire.errors import anthropic_error
from ..wire.schema import Json, spelled
from ..wire.sse import stream_reply
from .anthropic_request import CountTokensBody, MessagesBody, anthropic_chat

_NAMES = {
    "stop": "stop_sequences",
    r"tools\[(\d+)\]\.function\.parameters": r"tools[\1].input_schema",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
}
_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use"}  # others: "max_tokens"


async def messages(
    frontend: Frontend, request: web.Request, payload: Payload
) -> web.StreamResponse:
    """POST /v1/messages: the next message of a conversation, in Anthropic's format."""
    build = partial(anthropic_chat, facts=frontend.facts)
    with spelled(_NAMES):
        body, conversation = await payload.decode(
            MessagesBody, build, "messages", "system", "tools"
        )
        opening = open_chat(frontend, request, conversation)
        del conversation
        opened = await opening
    with opened as job:
        writer = MessageWriter(body, job)
        if body.stream:
            return await stream_reply(job, writer)
        await job.run()
        return await json_reply(job, writer.whole_message)


async def count_tokens(
    frontend: Frontend, request: web.Request, payload: Payload
) -> web.StreamResponse:
    """POST /v1/messages/count_tokens: the length of the prompt that /v1/messages would run."""
    build = partial(anthropic_chat, facts=frontend.facts)
    with spelled(_NAMES):
        _, conversation = await payload.decode(CountTokensBody, build)
        ids = await prompt_ids(frontend, conversation)
    return json_response({"input_tokens": len(ids)})


class MessageWriter:
    """One message, whole or as events."""

    def __init__(self, body: MessagesBody, job: Job[ChatStream]) -> None:
        self._job = job
        self._shows_thinking = body.thinking is None or body.thinking.display != "omitted"
        self._head: Json = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": body.model,
        }
        # The number of cached tokens is not known yet.
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None}
        message["usage"] = _usage(job.usage())
        self.keep_alive = _event({"type": "ping"})
        self.opening = _event({"type": "message_start", "message": message}) + self.keep_alive
        self._index = -1  # of the block that is open, or was last
        self._open_type: str | None = None  # of the open block
        self._thinking_hash = hashlib.sha256()

    def add(self, reply: Reply[ChatStream]) -> bytes:
        """The events for new deltas."""
        deltas, _ = reply.stream.take()
        return b"".join(_event(data) for delta in deltas for data in self._delta(delta))

    def end(self) -> bytes:
        """The end of the stream."""
        last = {"type": "message_delta", "delta": self._stop(), "usage": _usage(self._job.usage())}
        events = [*self._close(), last, {"type": "message_stop"}]
        return b"".join(map(_event, events))

    def fail(self, error: HttpError) -> bytes:
        """The last event of a stream that breaks."""
        return _event(anthropic_error(error.status, str(error)))

    def whole_message(self) -> Json:
        """The reply of a request that does not stream."""
        deltas, _ = self._job.replies[0].stream.take()
        blocks: list[Json] = []
        for delta in deltas:
            match delta:
                case CallArguments(_, text):  # they follow the start of their call
                    blocks[-1]["input"] = _input(text)
                case CallStart(_, call_id, name):
                    blocks.append(_tool_use(call_id, name))
                case Content(text):
                    blocks.append({"type": "text", "text": text})
                case Reasoning(text):
                    blocks.append(self._thinking_block(text))
        usage = _usage(self._job.usage())
        return {**self._head, "content": blocks, **self._stop(), "usage": usage}

    def _thinking_block(self, text: str) -> Json:
        shown = text if self._shows_thinking else ""
        signature = hashlib.sha256(text.encode()).hexdigest()
        return {"type": "thinking", "thinking": shown, "signature": signature}

    def _stop(self) -> Json:
        """Why the message ended."""
        [reply] = self._job.replies
        stop_string = reply.stream.stop_string
        reason = _STOP_REASONS.get(chat_finish_reason(reply) or "", "max_tokens")
        if stop_string is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": stop_string}

    def _delta(self, delta: Delta) -> Iterator[Json]:
        match delta:
            case Reasoning(text):
                if self._open_type != "thinking":
                    self._thinking_hash = hashlib.sha256()
                    yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
                self._thinking_hash.update(text.encode())
                if self._shows_thinking:
                    yield self._block_delta({"type": "thinking_delta", "thinking": text})
            case Content(text):
                if self._open_type != "text":
                    yield from self._open({"type": "text", "text": ""})
                yield self._block_delta({"type": "text_delta", "text": text})
            case CallStart(_, call_id, name):
                yield from self._open(_tool_use(call_id, name))
            case CallArguments(_, text):
                yield self._block_delta({"type": "input_json_delta", "partial_json": text})

    def _open(self, block: Json) -> Iterator[Json]:
        yield from self._close()
        self._index, self._open_type = self._index + 1, block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _block_delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[Json]:
        if self._open_type == "thinking":
            signature = self._thinking_hash.hexdigest()
            yield self._block_delta({"type": "signature_delta", "signature": signature})
        if self._open_type is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open_type = None


def _event(data: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), encode_json(data))


def _tool_use(call_id: str, name: str) -> Json:
    tool_id = "toolu_" + call_id.removeprefix("call_")
    return {"type": "tool_use", "id": tool_id, "name": name, "input": {}}


def _input(arguments: str) -> Json:
    """A call's arguments; {} if the output was cut off inside them (stop_reason says so)."""
    try:
        return msgspec.json.decode(arguments, type=dict)
    except (msgspec.MsgspecError, RecursionError):
        return {}


def _usage(usage: Usage) -> Json:
    """Anthropic's counts. Input tokens are those that the prefix cache did not hold."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
    }
