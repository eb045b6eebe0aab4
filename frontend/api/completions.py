"""OpenAI's completions route: raw text in, raw text out, several prompts at once.

No template and no added special tokens. `echo` puts the prompt in front of the text, with
`logprobs` also its tokens; then `max_tokens` may be 0, which scores a text without adding to it.
Streams, usage and chunks are those of `chunks.py`.
"""

import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

import msgspec
from aiohttp import web

from ...shared.messages import TokenLogprob
from ..context import Frontend
from ..engine.constraints import constraint_for
from ..engine.job import Job, Sequence
from ..engine.params import GenerationSpec, openai_spec, parse_prompts
from ..text.detokenize import Decoder, Piece, TextOptions, Vocabulary
from ..wire.body import encode_json
from ..wire.schema import CompletionBody, decode_body, wrong
from ..wire.sse import KEEP_ALIVE, EventStream
from .chunks import PREFIX, Chunks, Json, usage_json
from .generate import named_logprobs


async def completions(frontend: Frontend, request: web.Request, data: bytes) -> web.StreamResponse:
    """POST /v1/completions: how texts go on."""
    body = decode_body(data, CompletionBody)
    spec = _spec(frontend, body)
    prompts = parse_prompts(body.prompt)
    if body.stream and len(prompts) > 1:
        raise wrong("prompt", "a stream takes one prompt")
    prompt_ids = [await _encode(frontend, prompt) for prompt in prompts]
    ends = {tuple(ids[-1:]) for ids in prompt_ids}
    shared = prompt_ids[0] if len(ends) == 1 else []
    spec = dataclasses.replace(
        spec, grammar=await constraint_for(frontend, spec, prompt_ids=shared)
    )
    echoes = [_echo(frontend, prompt) if body.echo else "" for prompt in prompts]
    with Job(frontend, request, prompt_ids, spec, "prompt") as job:
        reply_id = f"cmpl-{'batch-' if len(prompts) > 1 else ''}{secrets.token_hex(4)}"
        chunks = Chunks("text_completion", reply_id, body)
        formatter = _Formatter(frontend, body, job, echoes)
        if body.stream:
            return await _stream(frontend, request, job, chunks, formatter)
        await job.run()
        choices = [formatter.choice(sequence) for sequence in job.sequences]
        return chunks.whole_reply("text_completion", choices, formatter.usage())


def _spec(frontend: Frontend, body: CompletionBody) -> GenerationSpec:
    """What the body asks for. An output of 0 tokens is one token that is not shown."""
    if body.suffix:
        raise wrong("suffix", "not supported")
    if body.max_tokens == 0 and not body.echo:
        raise wrong("max_tokens", "must be at least 1 without echo")
    if body.prompt_logprobs is not None and body.prompt_logprobs >= 0 and body.stream:
        raise wrong("prompt_logprobs", "not available in streams")
    num_logprobs = -1 if body.logprobs is None else body.logprobs
    max_tokens = None if body.max_tokens is None else max(1, body.max_tokens)
    spec = openai_spec(body, frontend.facts, max_tokens, num_logprobs)
    asked = -1 if body.prompt_logprobs is None else body.prompt_logprobs
    asked = max(asked, num_logprobs if body.echo else -1)
    sampling = msgspec.structs.replace(spec.sampling, num_prompt_logprobs=asked)
    return dataclasses.replace(spec, sampling=sampling)


async def _stream(
    frontend: Frontend, request: web.Request, job: Job, chunks: Chunks, formatter: "_Formatter"
) -> web.StreamResponse:
    """Write the job's sequences as chunks until all have ended. One write takes everything that
    came together."""
    stream = EventStream(request, frontend.stalls, PREFIX)
    while job.is_open:
        news = await job.receive()
        data = b"".join(chunk for one in news for chunk in formatter.chunks(chunks, one))
        if data or not news:
            await stream.write(data or KEEP_ALIVE)
    await stream.write(chunks.end(formatter.usage()))
    await stream.end()
    return stream.response


class _Formatter:
    """The choices of one request. `echoes` are the prompts' texts, empty unless asked for."""

    def __init__(
        self, frontend: Frontend, body: CompletionBody, job: Job, echoes: list[str]
    ) -> None:
        self._vocabulary = frontend.tokenizer.vocabulary
        self._body, self._job, self._echoes = body, job, echoes
        self._hidden = job.spec.text.hidden_ids
        self._is_score = body.max_tokens == 0
        self._unopened = {s.index for s in job.sequences if self._echo(s)}

    def choice(self, sequence: Sequence) -> Json:
        """A whole choice."""
        pieces = sequence.stream.take_pieces()
        choice: Json = {
            "index": sequence.index,
            "text": self._echo(sequence) + ("" if self._is_score else sequence.text),
            "logprobs": self._logprobs(sequence, pieces, with_prompt=True),
            "finish_reason": self._finish_reason(sequence),
        }
        if self._body.prompt_logprobs is not None and self._body.prompt_logprobs >= 0:
            found = [named_logprobs(self._vocabulary, one) for one in sequence.prompt_logprobs]
            choice["prompt_token_ids"] = self._prompt(sequence)
            choice["prompt_logprobs"] = [None, *found]
        return choice

    def chunks(self, chunks: Chunks, sequence: Sequence) -> Iterator[bytes]:
        """What a piece of a sequence adds to a stream. The prompt goes first, when all is known
        about it."""
        index = sequence.index
        if index in self._unopened and (sequence.stream.num_tokens or sequence.finished):
            self._unopened.discard(index)
            logprobs = self._logprobs(sequence, [], with_prompt=True)
            yield chunks.chunk(index, _text(self._echo(sequence)), logprobs)
        pieces = sequence.stream.take_pieces() if self._job.spec.text.record_pieces else []
        if (sequence.text or pieces) and not self._is_score:
            logprobs = self._logprobs(sequence, pieces, with_prompt=False)
            yield chunks.chunk(index, _text(sequence.text), logprobs)
        if sequence.finished is not None:
            yield chunks.chunk(index, _text(""), finish_reason=self._finish_reason(sequence))

    def usage(self) -> Json:
        """The counts; what is not shown does not count."""
        prompt, output, cached = self._job.usage()
        return usage_json(prompt, 0 if self._is_score else output, cached)

    def _finish_reason(self, sequence: Sequence) -> str | None:
        return "length" if self._is_score else sequence.finish_reason

    def _echo(self, sequence: Sequence) -> str:
        return self._echoes[sequence.index // self._job.spec.n]

    def _prompt(self, sequence: Sequence) -> list[int]:
        return self._job.prompts[sequence.index // self._job.spec.n]

    def _logprobs(self, sequence: Sequence, pieces: list[Piece], with_prompt: bool) -> Json | None:
        if self._body.logprobs is None:
            return None
        start = len(self._echo(sequence))
        shown = [] if self._is_score else [p for p in pieces if p.token_id not in self._hidden]
        shown = [piece._replace(offset=piece.offset + start) for piece in shown]
        if self._body.echo and with_prompt:
            logprobs = [None, *sequence.prompt_logprobs]
            shown = _prompt_pieces(self._vocabulary, self._prompt(sequence), logprobs) + shown
        return completion_logprobs(self._vocabulary, shown, self._body.logprobs)


def completion_logprobs(vocabulary: Vocabulary, pieces: list[Piece], num_top: int) -> Json:
    """`logprobs` of a completion choice; nothing is known about a prompt's first token."""
    tops: list[Json | None] = []
    for piece in pieces:
        if piece.logprob is None:
            tops.append(None)
            continue
        chosen = {vocabulary.text(piece.token_id): piece.logprob.logprob}
        top = piece.logprob.top[:num_top]
        tops.append({vocabulary.text(i): value for i, value in top} | chosen)
    return {
        "tokens": [vocabulary.text(piece.token_id) for piece in pieces],
        "token_logprobs": [p.logprob.logprob if p.logprob else None for p in pieces],
        "top_logprobs": tops,
        "text_offset": [piece.offset for piece in pieces],
    }


def _prompt_pieces(
    vocabulary: Vocabulary, prompt: list[int], logprobs: list[TokenLogprob | None]
) -> list[Piece]:
    """The prompt's tokens, with where their text begins in the echo."""
    decoder, offset = Decoder(vocabulary, TextOptions()), 0
    pieces = []
    for token_id, logprob in zip(prompt, logprobs, strict=False):
        text = decoder.text(token_id)
        pieces.append(Piece(token_id, text, offset, logprob))
        offset += len(text)
    return pieces


def _text(text: str) -> bytes:
    return b'"text":' + encode_json(text)


async def _encode(frontend: Frontend, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        max_total = frontend.client.max_req_total_len
        return await frontend.tokenizer.encode(prompt, "prompt", max_total)
    frontend.tokenizer.check_ids(prompt, "prompt")
    ids: list[int] = prompt
    return ids


def _echo(frontend: Frontend, prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else frontend.tokenizer.decode(prompt)
