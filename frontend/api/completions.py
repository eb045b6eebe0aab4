"""OpenAI's completions route: raw text in, raw text out, several prompts at once.

No template and no added special tokens. `echo` puts the prompt in front of the text, with
`logprobs` also its tokens; then `max_tokens` may be 0, which scores a text without adding to it.
"""

import dataclasses
import secrets
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from ...shared.messages import TokenLogprob
from ..context import Frontend
from ..engine.job import Job, Reply, open_job
from ..engine.params import GenerationSpec, openai_spec, parse_prompts
from ..text.detokenize import DecodedToken, Decoder, TextOptions, TextStream, Vocabulary
from ..wire.body import Payload, encode_json, json_reply
from ..wire.schema import CompletionBody, Json, wrong
from ..wire.sse import stream_reply
from .generate import named_logprobs
from .openai import ChunkWriter, usage_json


async def completions(
    frontend: Frontend, request: web.Request, payload: Payload
) -> web.StreamResponse:
    """POST /v1/completions: the continuation of one text or several."""
    body, checked = await payload.decode(CompletionBody, partial(_check, frontend), "prompt")
    opening = _open(frontend, request, *checked)
    del checked
    opened, echoes = await opening
    with opened as job:
        writer = _CompletionWriter(body, job, echoes)
        if body.stream:
            return await stream_reply(job, writer)
        await job.run()
        return await json_reply(job, writer.whole_reply)


def _check(frontend: Frontend, body: CompletionBody) -> tuple[GenerationSpec, list[Any], list[str]]:
    """How to generate, the prompts, and their texts if the replies repeat them."""
    spec = _spec(frontend, body)
    prompts = parse_prompts(body.prompt)
    for prompt in prompts:
        if not isinstance(prompt, str):
            frontend.tokenizer.check_ids(prompt, "prompt")
    echoes = [_echo(frontend, prompt) if body.echo else "" for prompt in prompts]
    return spec, prompts, echoes


async def _open(
    frontend: Frontend,
    request: web.Request,
    spec: GenerationSpec,
    prompts: list[Any],
    echoes: list[str],
) -> tuple[Job[TextStream], list[str]]:
    prompt_ids = [await _encode(frontend, prompt) for prompt in prompts]
    make_stream = partial(TextStream, frontend.tokenizer.vocabulary, spec.text)
    return await open_job(frontend, request, prompt_ids, spec, make_stream, "prompt"), echoes


def _spec(frontend: Frontend, body: CompletionBody) -> GenerationSpec:
    """How to generate. For an output of 0 tokens, one token is generated and not shown."""
    if body.suffix:
        raise wrong("suffix", "not supported")
    if body.max_tokens == 0 and not body.echo:
        raise wrong("max_tokens", "must be at least 1 without echo")
    if body.prompt_logprobs is not None and body.prompt_logprobs >= 0 and body.stream:
        raise wrong("prompt_logprobs", "not available in streams")
    num_logprobs = -1 if body.logprobs is None else body.logprobs
    max_tokens = None if body.max_tokens is None else max(1, body.max_tokens)
    spec = openai_spec(body, frontend.facts, max_tokens, num_logprobs)
    num_prompt_logprobs = -1 if body.prompt_logprobs is None else body.prompt_logprobs
    if body.echo:
        num_prompt_logprobs = max(num_prompt_logprobs, num_logprobs)
    sampling = msgspec.structs.replace(spec.sampling, num_prompt_logprobs=num_prompt_logprobs)
    return dataclasses.replace(spec, sampling=sampling)


class _CompletionWriter(ChunkWriter):
    """The choices of one request. `echoes` are the prompts' texts, empty unless requested."""

    def __init__(self, body: CompletionBody, job: Job[TextStream], echoes: list[str]) -> None:
        reply_id = f"cmpl-{'batch-' if len(job.prompt_lengths) > 1 else ''}{secrets.token_hex(4)}"
        super().__init__("text_completion", reply_id, body, job)
        self._vocabulary = job.frontend.tokenizer.vocabulary
        self._body, self._echoes = body, echoes
        self._is_score = body.max_tokens == 0
        self._unopened = {reply.index for reply in job.replies if self._echo(reply)}

    def add(self, reply: Reply[TextStream]) -> bytes:
        """The prompt, once all of its logprobs are there, then new text, then the end."""
        chunks = []
        index = reply.index
        if index in self._unopened and (reply.stream.num_tokens or reply.finished):
            self._unopened.discard(index)
            logprobs = self._logprobs(reply, [], with_prompt=True)
            chunks.append(self.chunk(index, _text(self._echo(reply)), logprobs))
        text, tokens = reply.stream.take()
        if (text or tokens) and not self._is_score:
            logprobs = self._logprobs(reply, tokens, with_prompt=False)
            chunks.append(self.chunk(index, _text(text), logprobs))
        if reply.finished is not None:
            reason = self._finish_reason(reply)
            chunks.append(self.chunk(index, _text(""), finish_reason=reason))
        return b"".join(chunks)

    def whole_reply(self) -> Json:
        """The reply of a request that does not stream."""
        choices = [self._choice(reply) for reply in self.job.replies]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def _choice(self, reply: Reply[TextStream]) -> Json:
        text, tokens = reply.stream.take()
        choice: Json = {
            "index": reply.index,
            "text": self._echo(reply) + ("" if self._is_score else text),
            "logprobs": self._logprobs(reply, tokens, with_prompt=True),
            "finish_reason": self._finish_reason(reply),
        }
        if self._body.prompt_logprobs is not None and self._body.prompt_logprobs >= 0:
            entries = [named_logprobs(self._vocabulary, entry) for entry in reply.prompt_logprobs]
            choice["prompt_token_ids"] = self._prompt(reply)
            choice["prompt_logprobs"] = [None, *entries]
        return choice

    def usage(self) -> Json:
        """The token counts, without the token that is not shown."""
        usage = self.job.usage()
        return usage_json(dataclasses.replace(usage, output_tokens=0) if self._is_score else usage)

    def _finish_reason(self, reply: Reply[TextStream]) -> str | None:
        return "length" if self._is_score else reply.finish_reason

    def _echo(self, reply: Reply[TextStream]) -> str:
        return self._echoes[reply.index // self.job.spec.n]

    def _prompt(self, reply: Reply[TextStream]) -> list[int]:
        return self.job.prompts[reply.index // self.job.spec.n]

    def _logprobs(
        self, reply: Reply[TextStream], tokens: list[DecodedToken], with_prompt: bool
    ) -> Json | None:
        if self._body.logprobs is None:
            return None
        start = len(self._echo(reply))
        hidden = self.job.spec.text.hidden_ids
        shown = [
            token._replace(offset=token.offset + start)
            for token in tokens
            if token.token_id not in hidden and not self._is_score
        ]
        if self._body.echo and with_prompt:
            logprobs = [None, *reply.prompt_logprobs]
            shown = _prompt_tokens(self._vocabulary, self._prompt(reply), logprobs) + shown
        return completion_logprobs(self._vocabulary, shown, self._body.logprobs)


def completion_logprobs(vocabulary: Vocabulary, tokens: list[DecodedToken], num_top: int) -> Json:
    """`logprobs` of a completion choice. A prompt's first token has none."""
    tops: list[Json | None] = []
    for token in tokens:
        if token.logprob is None:
            tops.append(None)
            continue
        chosen = {vocabulary.text(token.token_id): token.logprob.logprob}
        top = token.logprob.top[:num_top]
        tops.append({vocabulary.text(i): value for i, value in top} | chosen)
    return {
        "tokens": [vocabulary.text(token.token_id) for token in tokens],
        "token_logprobs": [t.logprob.logprob if t.logprob else None for t in tokens],
        "top_logprobs": tops,
        "text_offset": [token.offset for token in tokens],
    }


def _prompt_tokens(
    vocabulary: Vocabulary, prompt: list[int], logprobs: list[TokenLogprob | None]
) -> list[DecodedToken]:
    """The prompt's tokens with their offsets in the echo."""
    decoder, offset = Decoder(vocabulary, TextOptions()), 0
    tokens = []
    for token_id, logprob in zip(prompt, logprobs, strict=False):
        text = decoder.text(token_id)
        tokens.append(DecodedToken(token_id, text, offset, logprob))
        offset += len(text)
    return tokens


def _text(text: str) -> bytes:
    return b'"text":' + encode_json(text)


async def _encode(frontend: Frontend, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        max_total = frontend.client.max_req_total_len
        return await frontend.tokenizer.encode(prompt, "prompt", max_total)
    ids: list[int] = prompt
    return ids


def _echo(frontend: Frontend, prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else frontend.tokenizer.decode(prompt)
