"""OpenAI's chat route and what it shares with completions: chunks, usage, streaming.

The text is the model's raw output: reasoning and tool-call text stay in `content`, whatever
`--reasoning_parser` and `--tool_call_parser` say. A matched stop string is removed. Sampled by
default. Every stream ends with `data: [DONE]`, except one that breaks.
"""

import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

from aiohttp import web

from . import ops
from .conversation import check_tools, normalise_messages
from .detokenize import Piece, Vocabulary
from .job import Frontend, Job, Sequence
from .params import openai_spec
from .schema import ChatBody, OpenAiBody, decode_body, wrong
from .sse import KEEP_ALIVE, EventStream, encode_json

Json = dict[str, Any]
_PREFIX = b"data: "
_DONE = b"data: [DONE]\n\n"
FormatLogprobs = Callable[[list[Piece]], Json | None]


async def chat(frontend: Frontend, request: web.Request, data: bytes) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    body = decode_body(data, ChatBody)
    _refuse_unsupported(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else -1
    max_tokens = body.max_completion_tokens or body.max_tokens
    spec = openai_spec(body, frontend.facts, max_tokens, num_logprobs)
    tools = check_tools(body.tools)
    prompt = await frontend.tokenizer.encode_chat(
        normalise_messages(body.messages),
        None if body.tool_choice == "none" else tools,
        body.chat_template_kwargs or {},
        frontend.client.max_req_total_len,
    )
    vocabulary, hidden = frontend.tokenizer.vocabulary, spec.text.hidden_ids

    def format_logprobs(pieces: list[Piece]) -> Json | None:
        return chat_logprobs(vocabulary, pieces, hidden) if num_logprobs >= 0 else None

    with Job(frontend, request, [prompt], spec, "messages") as job:
        chunks = Chunks("chat.completion.chunk", f"chatcmpl-{secrets.token_hex(16)}", body)
        if body.stream:
            return await stream_choices(frontend, request, job, chunks, format_logprobs)
        await job.run()
        choices = [
            {
                "index": sequence.index,
                "message": {
                    "role": "assistant",
                    "content": sequence.text,
                    "reasoning_content": None,
                    "reasoning": None,
                    "tool_calls": None,
                },
                "logprobs": format_logprobs(sequence.stream.take_pieces()),
                "finish_reason": sequence.finish_reason,
            }
            for sequence in job.sequences
        ]
        return chunks.whole_reply("chat.completion", choices, job)


class Chunks:
    """The JSON of one reply. What never changes is encoded once: a text chunk costs one small
    string."""

    def __init__(self, kind: str, reply_id: str, body: OpenAiBody) -> None:
        self._head: Json = {
            "id": reply_id,
            "object": kind,
            "created": int(time.time()),
            "model": body.model,
        }
        options = body.stream_options
        self.include_usage = options is not None and bool(options.include_usage)
        self._is_chat = kind.startswith("chat")
        open_head = _PREFIX + encode_json(self._head)[:-1] + b',"choices":[{"index":'
        self._before = open_head
        self._text = b',"delta":{"content":' if self._is_chat else b',"text":'
        self._logprobs = b'},"logprobs":' if self._is_chat else b',"logprobs":'
        self._reason = b',"finish_reason":'
        self._end = b'}],"usage":null}\n\n' if self.include_usage else b"}]}\n\n"
        self._plain_end = self._logprobs + b"null" + self._reason + b"null" + self._end

    def first(self, index: int) -> bytes:
        """The chunk that opens a choice: chat's role, nothing for completions."""
        if not self._is_chat:
            return b""
        delta = b',"delta":{"role":"assistant","content":""'
        return self._before + b"%d" % index + delta + self._plain_end

    def text(self, index: int, text: str, logprobs: Json | None = None) -> bytes:
        """A chunk of text."""
        start = self._before + b"%d" % index + self._text + encode_json(text)
        if logprobs is None:
            return start + self._plain_end
        return start + self._logprobs + encode_json(logprobs) + self._reason + b"null" + self._end

    def last(self, index: int, finish_reason: str | None) -> bytes:
        """The chunk that ends a choice: no text."""
        delta = b',"delta":{' if self._is_chat else b',"text":""'
        reason = self._reason + encode_json(finish_reason)
        return self._before + b"%d" % index + delta + self._logprobs + b"null" + reason + self._end

    def usage(self, job: Job) -> bytes:
        """The chunk with the counts and no choices."""
        return _PREFIX + encode_json({**self._head, "choices": [], "usage": usage(job)}) + b"\n\n"

    def whole_reply(self, kind: str, choices: list[Json], job: Job) -> web.Response:
        """The reply of a request that does not stream."""
        body = {**self._head, "object": kind, "choices": choices, "usage": usage(job)}
        return ops.reply(body)


async def stream_choices(
    frontend: Frontend,
    request: web.Request,
    job: Job,
    chunks: Chunks,
    format_logprobs: FormatLogprobs,
    opening_text: str = "",
) -> web.StreamResponse:
    """Write the job's sequences as chunks until all have ended. One write takes everything that
    came together; `opening_text` precedes each sequence (echo)."""
    stream = EventStream(request, frontend.stalls, _PREFIX)
    wants_pieces = job.spec.text.record_pieces
    unopened = {sequence.index for sequence in job.sequences}

    def format_news(sequence: Sequence) -> Iterable[bytes]:
        index = sequence.index
        if index in unopened:
            unopened.discard(index)
            yield chunks.first(index)
            if opening_text:
                yield chunks.text(index, opening_text)
        pieces = sequence.stream.take_pieces() if wants_pieces else []
        if sequence.text or pieces:
            yield chunks.text(index, sequence.text, format_logprobs(pieces))
        if sequence.finished is not None:
            yield chunks.last(index, sequence.finish_reason)

    while job.is_open:
        news = await job.receive()
        data = b"".join(chunk for sequence in news for chunk in format_news(sequence))
        if data or not news:
            await stream.write(data or KEEP_ALIVE)
    await stream.write(chunks.usage(job) + _DONE if chunks.include_usage else _DONE)
    await stream.end()
    return stream.response


def usage(job: Job) -> Json:
    """OpenAI's counts; output tokens are summed over choices."""
    prompt_tokens, output_tokens, cached_tokens = job.usage()
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens, "audio_tokens": 0},
    }


def chat_logprobs(vocabulary: Vocabulary, pieces: list[Piece], hidden: frozenset[int]) -> Json:
    """`logprobs` of a chat choice; end tokens, which have no text, are left out."""

    def entry(token_id: int, logprob: float) -> Json:
        data = vocabulary.token_bytes[token_id]
        return {"token": vocabulary.text(token_id), "logprob": logprob, "bytes": list(data)}

    content = [
        {
            **entry(piece.token_id, piece.logprob.logprob),
            "top_logprobs": [entry(*pair) for pair in piece.logprob.top],
        }
        for piece in pieces
        if piece.logprob is not None and piece.token_id not in hidden
    ]
    return {"content": content, "refusal": None}


def _refuse_unsupported(body: ChatBody) -> None:
    if body.tool_choice not in (None, "auto", "none"):
        raise wrong("tool_choice", "only 'auto' and 'none' are supported")
    if body.function_call not in (None, "none"):
        raise wrong("function_call", "not supported, use tools")
    if body.functions:
        raise wrong("functions", "not supported, use tools")
    if body.chat_template is not None:
        raise wrong("chat_template", "is the server's to choose")
