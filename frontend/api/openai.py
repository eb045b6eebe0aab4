"""OpenAI's chat route: writes chat replies as OpenAI's JSON, whole or in chunks.

Reasoning is under both keys in use, `reasoning_content` and `reasoning`, or under one of them. A
matched stop string is removed. Sampled by default. Every stream ends with `data: [DONE]`, except
one that breaks.
`ChunkWriter` is the part that /v1/completions shares.
"""

import secrets
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from aiohttp import web

from ...shared.errors import HttpError
from ..chat.chat import ChatStream, chat_finish_reason, open_chat
from ..chat.client_tools import Forms, input_text
from ..chat.request import chat_request
from ..context import Frontend
from ..engine.job import Job, Reply, Usage
from ..parsers.deltas import (
    AssistantMessage,
    CallArguments,
    CallStart,
    Content,
    Delta,
    Reasoning,
    join,
)
from ..text.detokenize import DecodedToken, Vocabulary
from ..wire.body import Payload, encode_json, json_reply
from ..wire.schema import ChatBody, Json, OpenAiBody
from ..wire.sse import KEEP_ALIVE, error_json, stream_reply

_PREFIX = b"data: "
DONE = b"data: [DONE]\n\n"
_OPENING = b'"delta":{"role":"assistant","content":""}'
_EMPTY = b'"delta":{}'
_REASONING_KEYS = ("reasoning_content", "reasoning")


async def chat(frontend: Frontend, request: web.Request, payload: Payload) -> web.StreamResponse:
    """POST /v1/chat/completions: the next message of a conversation."""
    build = partial(chat_request, facts=frontend.facts)
    body, conversation = await payload.decode(ChatBody, build, "messages", "tools")
    opening, forms = open_chat(frontend, request, conversation), conversation.forms
    del conversation  # it may be large, and the reply may take long
    with await opening as job:
        writer = _ChatWriter(body, job, forms)
        if body.stream:
            return await stream_reply(job, writer)
        await job.run()
        return await json_reply(job, writer.whole_reply)


class ChunkWriter:
    """The chunks of one reply. Constant JSON is encoded once; a chunk encodes only its delta."""

    opening = b""  # a choice is opened by its first chunk
    keep_alive = KEEP_ALIVE

    def __init__(self, kind: str, reply_id: str, body: OpenAiBody, job: Job[Any]) -> None:
        self.job = job
        self.head: Json = {
            "id": reply_id,
            "object": kind,
            "created": int(time.time()),
            "model": body.model,
        }
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._before = _PREFIX + encode_json(self.head)[:-1] + b',"choices":[{"index":'
        self._end = b'}],"usage":null}\n\n' if self._include_usage else b"}]}\n\n"
        self._plain_end = b',"logprobs":null,"finish_reason":null' + self._end

    def chunk(
        self,
        index: int,
        member: bytes,
        logprobs: Json | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        """A chunk of choice `index`. `member` is its JSON member, such as `"text":"..."`."""
        start = self._before + b"%d," % index + member
        if logprobs is None and finish_reason is None:
            return start + self._plain_end
        logprobs_json, reason = encode_json(logprobs), encode_json(finish_reason)
        return start + b',"logprobs":%b,"finish_reason":%b' % (logprobs_json, reason) + self._end

    def end(self) -> bytes:
        """The last events: the token counts, if they were requested, and [DONE]."""
        if not self._include_usage:
            return DONE
        last = {**self.head, "choices": [], "usage": self.usage()}
        return _PREFIX + encode_json(last) + b"\n\n" + DONE

    def usage(self) -> Json:
        """The token counts of the reply."""
        return usage_json(self.job.usage())

    def fail(self, error: HttpError) -> bytes:
        """The last event of a stream that breaks."""
        return _PREFIX + error_json(error) + b"\n\n"


class _ChatWriter(ChunkWriter):
    def __init__(self, body: ChatBody, job: Job[ChatStream], forms: Forms) -> None:
        super().__init__("chat.completion.chunk", f"chatcmpl-{secrets.token_hex(16)}", body, job)
        self._forms = forms
        keys = body.reasoning_field or job.frontend.config.reasoning_field
        self._reasoning_keys = _REASONING_KEYS if keys == "both" else (keys,)
        self._inputs: dict[tuple[int, int], str] = {}  # of open calls of free-text tools
        self._vocabulary = job.frontend.tokenizer.vocabulary
        self._wants_logprobs = bool(body.logprobs)
        self._opened: set[int] = set()  # choices whose first chunk was written

    def add(self, reply: Reply[ChatStream]) -> bytes:
        """A chunk for each delta, one for the end."""
        chunks = []
        if reply.index not in self._opened:
            self._opened.add(reply.index)
            chunks.append(self.chunk(reply.index, _OPENING))
        deltas, tokens = reply.stream.take()
        for delta in deltas:
            logprobs = None
            if tokens and isinstance(delta, Content):
                logprobs, tokens = chat_logprobs(self._vocabulary, tokens), []
            member = self._member(reply.index, delta)
            chunks.append(self.chunk(reply.index, member, logprobs))
        if tokens:  # of text that was sent before
            logprobs = chat_logprobs(self._vocabulary, tokens)
            chunks.append(self.chunk(reply.index, _delta(Content("")), logprobs))
        reason = chat_finish_reason(reply)
        if reason is not None:
            chunks += self._custom_inputs(reply.index)
            chunks.append(self.chunk(reply.index, _EMPTY, finish_reason=reason))
        return b"".join(chunks)

    def _member(self, index: int, delta: Delta) -> bytes:
        """The JSON member of a delta. The input of a free-text tool is sent when the reply ends, as
        it must be decoded."""
        match delta:
            case Reasoning(text):
                return b'"delta":%b' % encode_json(dict.fromkeys(self._reasoning_keys, text))
            case CallStart(call, call_id, name) if name in self._forms:
                self._inputs[index, call] = ""
                custom = {"name": name, "input": ""}
                return _call({"index": call, "id": call_id, "type": "custom", "custom": custom})
            case CallArguments(call, text) if (index, call) in self._inputs:
                self._inputs[index, call] += text
                return _EMPTY
        return _delta(delta)

    def _custom_inputs(self, index: int) -> list[bytes]:
        calls = [call for choice, call in self._inputs if choice == index]
        inputs = {call: input_text(self._inputs.pop((index, call))) for call in calls}
        members = [{"index": call, "custom": {"input": text}} for call, text in inputs.items()]
        return [self.chunk(index, _call(member)) for member in members]

    def whole_reply(self) -> Json:
        """The reply of a request that does not stream."""
        choices = [self._choice(reply) for reply in self.job.replies]
        return {
            **self.head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self.usage(),
        }

    def _choice(self, reply: Reply[ChatStream]) -> Json:
        deltas, tokens = reply.stream.take()
        return {
            "index": reply.index,
            "message": _message(join(deltas), self._forms, self._reasoning_keys),
            "logprobs": chat_logprobs(self._vocabulary, tokens) if self._wants_logprobs else None,
            "finish_reason": chat_finish_reason(reply),
        }

    def usage(self) -> Json:
        """The token counts, with those of the reasoning."""
        usage = self.job.usage()
        details = {"reasoning_tokens": usage.reasoning_tokens}
        return {**usage_json(usage), "completion_tokens_details": details}


def _delta(delta: Delta) -> bytes:
    match delta:
        case Content(text):
            return b'"delta":{"content":%b}' % encode_json(text)
        case CallStart(index, call_id, name):
            call: Json = {"index": index, "id": call_id, "type": "function"}
            call["function"] = {"name": name, "arguments": ""}
        case CallArguments(index, text):
            call = {"index": index, "function": {"arguments": text}}
    return _call(call)


def _call(call: Json) -> bytes:
    return b'"delta":{"tool_calls":[%b]}' % encode_json(call)


def _message(message: AssistantMessage, forms: Forms, reasoning_keys: Iterable[str]) -> Json:
    calls: list[Json] = []
    for call in message.tool_calls:
        kind, given = "function", {"name": call.name, "arguments": call.arguments}
        if call.name in forms:
            kind, given = "custom", {"name": call.name, "input": input_text(call.arguments)}
        calls.append({"id": call.id, "type": kind, kind: given})
    return {
        "role": "assistant",
        "content": message.content or (None if calls else ""),
        **dict.fromkeys(reasoning_keys, message.reasoning),
        "tool_calls": calls or None,
    }


def usage_json(usage: Usage) -> Json:
    """OpenAI's token counts; output tokens are summed over choices."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
    }


def chat_logprobs(vocabulary: Vocabulary, tokens: list[DecodedToken]) -> Json:
    """`logprobs` of a choice: the tokens of its content."""

    def entry(token_id: int, logprob: float) -> Json:
        data = vocabulary.token_bytes[token_id]
        return {"token": vocabulary.text(token_id), "logprob": logprob, "bytes": list(data)}

    content = [
        {
            **entry(token.token_id, token.logprob.logprob),
            "top_logprobs": [entry(*pair) for pair in token.logprob.top],
        }
        for token in tokens
        if token.logprob is not None
    ]
    return {"content": content, "refusal": None}
