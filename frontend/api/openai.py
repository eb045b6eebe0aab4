"""OpenAI's chat route: a writer of what `chat.py` gives.

Reasoning is under both keys in use, `reasoning_content` and `reasoning`. A matched stop string is
removed. Sampled by default. Every stream ends with `data: [DONE]`, except one that breaks.
"""

import secrets
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from ..chat.chat import ChatJob, Choice, News, open_chat
from ..chat.request import chat_request
from ..context import Frontend
from ..parsers.deltas import CallArguments, CallStart, Content, Delta, Reasoning
from ..text.detokenize import Piece, Vocabulary
from ..wire.body import encode_json
from ..wire.schema import ChatBody, decode_body
from ..wire.sse import KEEP_ALIVE, EventStream
from .chunks import PREFIX, Chunks, Json, usage_json

_FIRST = b'"delta":{"role":"assistant","content":""}'
_LAST = b'"delta":{}'
_NO_TEXT = Content("")


async def chat(frontend: Frontend, request: web.Request, data: bytes) -> web.StreamResponse:
    """POST /v1/chat/completions: the next message of a conversation."""
    body = decode_body(data, ChatBody)
    with await open_chat(frontend, request, chat_request(body, frontend.facts)) as job:
        writer = _Writer(body, frontend.tokenizer.vocabulary)
        if body.stream:
            return await _stream(frontend, request, job, writer)
        choices = await job.run()
        return writer.whole_reply(choices, job)


async def _stream(
    frontend: Frontend, request: web.Request, job: ChatJob, writer: "_Writer"
) -> web.StreamResponse:
    """One write takes everything that came together."""
    stream = EventStream(request, frontend.stalls, PREFIX)
    unopened = set(range(job.num_choices))
    while job.is_open:
        chunks: list[bytes] = []
        received = await job.receive()
        for news in received:
            if news.index in unopened:
                unopened.discard(news.index)
                chunks.append(writer.first(news.index))
            chunks += writer.news(news)
        if chunks or not received:
            await stream.write(b"".join(chunks) or KEEP_ALIVE)
    await stream.write(writer.end(job))
    await stream.end()
    return stream.response


class _Writer:
    """Chat's JSON for one request."""

    def __init__(self, body: ChatBody, vocabulary: Vocabulary) -> None:
        self._chunks = Chunks("chat.completion.chunk", f"chatcmpl-{secrets.token_hex(16)}", body)
        self._vocabulary = vocabulary
        self._wants_logprobs = bool(body.logprobs)

    def first(self, index: int) -> bytes:
        """The chunk that opens a choice."""
        return self._chunks.chunk(index, _FIRST)

    def news(self, news: News) -> Iterator[bytes]:
        """A chunk for each delta, one for the end."""
        pieces = news.pieces
        for delta in news.deltas:
            logprobs = None
            if pieces and isinstance(delta, Content):
                logprobs, pieces = self._logprobs(pieces), []
            yield self._chunks.chunk(news.index, _delta(delta), logprobs)
        if pieces:  # tokens of text that went out before
            yield self._chunks.chunk(news.index, _delta(_NO_TEXT), self._logprobs(pieces))
        if news.finish_reason is not None:
            yield self._chunks.chunk(news.index, _LAST, finish_reason=news.finish_reason)

    def end(self, job: ChatJob) -> bytes:
        """What closes the stream."""
        return self._chunks.end(_usage(job))

    def whole_reply(self, choices: list[Choice], job: ChatJob) -> web.Response:
        """The reply of a request that does not stream."""
        written = [
            {
                "index": choice.index,
                "message": _message(choice),
                "logprobs": self._logprobs(choice.pieces) if self._wants_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return self._chunks.whole_reply("chat.completion", written, _usage(job))

    def _logprobs(self, pieces: list[Piece]) -> Json:
        return chat_logprobs(self._vocabulary, pieces)


def _delta(delta: Delta) -> bytes:
    match delta:
        case Content(text):
            return b'"delta":{"content":%b}' % encode_json(text)
        case Reasoning(text):
            return b'"delta":{"reasoning_content":%b,"reasoning":%b}' % ((encode_json(text),) * 2)
        case CallStart(index, call_id, name):
            call: Json = {"index": index, "id": call_id, "type": "function"}
            call["function"] = {"name": name, "arguments": ""}
        case CallArguments(index, text):
            call = {"index": index, "function": {"arguments": text}}
    return b'"delta":{"tool_calls":[%b]}' % encode_json(call)


def _message(choice: Choice) -> Json:
    message = choice.message
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in message.tool_calls
    ]
    return {
        "role": "assistant",
        "content": message.content or (None if calls else ""),
        "reasoning_content": message.reasoning,
        "reasoning": message.reasoning,
        "tool_calls": calls or None,
    }


def _usage(job: ChatJob) -> Json:
    usage = job.usage()
    return {
        **usage_json(usage.prompt_tokens, usage.output_tokens, usage.cached_tokens),
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def chat_logprobs(vocabulary: Vocabulary, pieces: list[Piece]) -> Json:
    """`logprobs` of a choice: the tokens of its content."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = vocabulary.token_bytes[token_id]
        return {"token": vocabulary.text(token_id), "logprob": logprob, "bytes": list(data)}

    content = [
        {
            **entry(piece.token_id, piece.logprob.logprob),
            "top_logprobs": [entry(*pair) for pair in piece.logprob.top],
        }
        for piece in pieces
        if piece.logprob is not None
    ]
    return {"content": content, "refusal": None}
