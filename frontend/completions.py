"""OpenAI's completions route: raw text in, raw text out, several prompts at once.

No template and no added special tokens. Streams, usage and chunks are those of `openai.py`.
"""

import secrets
from typing import Any

from aiohttp import web

from .detokenize import Piece, Vocabulary
from .job import Frontend, Job
from .openai import Chunks, Json, stream_choices
from .params import openai_spec, parse_prompts
from .schema import CompletionBody, decode_body, wrong


async def completions(frontend: Frontend, request: web.Request, data: bytes) -> web.StreamResponse:
    """POST /v1/completions."""
    body = decode_body(data, CompletionBody)
    num_logprobs = -1 if body.logprobs is None else body.logprobs
    if body.suffix:
        raise wrong("suffix", "not supported")
    if body.echo and num_logprobs >= 0:
        raise wrong("echo", "cannot be combined with logprobs")
    spec = openai_spec(body, frontend.facts, body.max_tokens, num_logprobs)
    prompts = parse_prompts(body.prompt)
    if body.stream and len(prompts) > 1:
        raise wrong("prompt", "a stream takes one prompt")
    prompt_ids = [await _encode(frontend, prompt) for prompt in prompts]
    echoes = [_echo(frontend, prompt) if body.echo else "" for prompt in prompts]
    vocabulary, hidden = frontend.tokenizer.vocabulary, spec.text.hidden_ids

    def format_logprobs(pieces: list[Piece]) -> Json | None:
        return completion_logprobs(vocabulary, pieces, hidden) if num_logprobs >= 0 else None

    with Job(frontend, request, prompt_ids, spec, "prompt") as job:
        reply_id = f"cmpl-{'batch-' if len(prompts) > 1 else ''}{secrets.token_hex(4)}"
        chunks = Chunks("text_completion", reply_id, body)
        if body.stream:
            return await stream_choices(
                frontend, request, job, chunks, format_logprobs, opening_text=echoes[0]
            )
        await job.run()
        choices = [
            {
                "index": sequence.index,
                "text": echoes[sequence.index // spec.n] + sequence.text,
                "logprobs": format_logprobs(sequence.stream.take_pieces()),
                "finish_reason": sequence.finish_reason,
            }
            for sequence in job.sequences
        ]
        return chunks.whole_reply("text_completion", choices, job)


def completion_logprobs(
    vocabulary: Vocabulary, pieces: list[Piece], hidden: frozenset[int]
) -> Json:
    """`logprobs` of a completion choice; end tokens, which have no text, are left out."""
    shown = [p for p in pieces if p.logprob is not None and p.token_id not in hidden]
    tops: list[Json] = []
    for piece in shown:
        assert piece.logprob is not None, "pieces without logprobs were left out"
        chosen = {vocabulary.text(piece.token_id): piece.logprob.logprob}
        tops.append({vocabulary.text(i): value for i, value in piece.logprob.top} | chosen)
    return {
        "tokens": [vocabulary.text(piece.token_id) for piece in shown],
        "token_logprobs": [piece.logprob.logprob for piece in shown if piece.logprob],
        "top_logprobs": tops,
        "text_offset": [piece.offset for piece in shown],
    }


async def _encode(frontend: Frontend, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        max_total = frontend.client.max_req_total_len
        return await frontend.tokenizer.encode(prompt, "prompt", max_total)
    frontend.tokenizer.check_ids(prompt, "prompt")
    ids: list[int] = prompt
    return ids


def _echo(frontend: Frontend, prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else frontend.tokenizer.decode(prompt)
