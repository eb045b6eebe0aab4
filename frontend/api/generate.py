"""LightLLM's routes: /generate, /generate_stream, and / which is either.

Greedy unless do_sample. The text is not templated, the stop text stays in the output, and a stream
has exactly one `data:` event per token (clients count them) and no [DONE].
"""

import dataclasses
from typing import Any

from aiohttp import web

from ...shared.messages import TokenLogprob
from ..context import Frontend
from ..engine.constraints import constraint_for
from ..engine.job import Job, Sequence
from ..engine.params import generate_spec
from ..text.detokenize import Piece, Vocabulary
from ..wire.body import encode_json, reply
from ..wire.schema import GenerateBody, GenerateParameters, decode_body, wrong
from ..wire.sse import EventStream

Json = dict[str, Any]
_PREFIX = b"data:"


async def generate(frontend: Frontend, request: web.Request, data: bytes) -> web.StreamResponse:
    """POST /generate: all text at once."""
    return await _whole(frontend, request, decode_body(data, GenerateBody))


async def generate_stream(
    frontend: Frontend, request: web.Request, data: bytes
) -> web.StreamResponse:
    """POST /generate_stream: one event per token."""
    return await stream_events(frontend, request, decode_body(data, GenerateBody))


async def generate_either(
    frontend: Frontend, request: web.Request, data: bytes
) -> web.StreamResponse:
    """POST /: `stream` in the body chooses."""
    body = decode_body(data, GenerateBody)
    return await (stream_events if body.stream else _whole)(frontend, request, body)


async def start(frontend: Frontend, request: web.Request, body: GenerateBody) -> Job:
    """Check and submit. Raises RequestError."""
    spec = generate_spec(body, frontend.facts)
    max_total = frontend.client.max_req_total_len
    if isinstance(body.inputs, str):
        special = (body.parameters or GenerateParameters()).add_special_tokens is not False
        prompt = await frontend.tokenizer.encode(body.inputs, "inputs", max_total, special)
    else:
        prompt = body.inputs
        frontend.tokenizer.check_ids(prompt, "inputs")
    grammar = await constraint_for(frontend, spec, prompt_ids=prompt)
    spec = dataclasses.replace(spec, grammar=grammar)
    return Job(frontend, request, [prompt], spec, "inputs")


async def _whole(
    frontend: Frontend, request: web.Request, body: GenerateBody
) -> web.StreamResponse:
    with await start(frontend, request, body) as job:
        await job.run()
        formatter = Formatter(frontend, job)
        pieces = [sequence.stream.take_pieces() for sequence in job.sequences]

        def per_sequence(values: list[Any]) -> Any:
            return values if len(values) > 1 else values[0]

        result: Json = {
            "generated_text": [sequence.text for sequence in job.sequences],
            "count_output_tokens": per_sequence([s.stream.num_tokens for s in job.sequences]),
            "finish_reason": per_sequence([s.finish_reason for s in job.sequences]),
            "prompt_tokens": len(job.prompts[0]),
            "logprobs": per_sequence(
                [[formatter.logprobs(p.logprob) for p in ps] for ps in pieces]
            ),
            "input_usage": formatter.input_usage,
        }
        if body.parameters is not None and body.parameters.return_details:
            result["tokens"] = per_sequence(
                [formatter.details(s, ps) for s, ps in zip(job.sequences, pieces, strict=True)]
            )
        result |= formatter.prompt_logprobs(job.sequences[0])
    return reply(result)


async def stream_events(
    frontend: Frontend, request: web.Request, body: GenerateBody, is_tgi: bool = False
) -> web.StreamResponse:
    """The reply of /generate_stream. In TGI's format the last event has the whole text."""
    parameters = body.parameters or GenerateParameters()
    if (parameters.best_of or parameters.n or 1) != 1:
        raise wrong("parameters.best_of", "must be 1 for streams")
    with await start(frontend, request, body) as job:
        formatter = Formatter(frontend, job, is_tgi, bool(parameters.return_details))
        stream = EventStream(request, frontend.stalls, _PREFIX)
        sequence, num_sent = job.sequences[0], 0
        while job.is_open:
            received = await job.receive()
            formatter.texts += [one.text for one in received]
            pieces = sequence.stream.take_pieces()
            events = []
            for piece in pieces:
                num_sent += 1
                is_last = piece is pieces[-1] and sequence.stream.finish_reason is not None
                events.append(formatter.event(sequence, piece, num_sent, is_last))
            if sequence.finished is not None and sequence.stream.finish_reason is None:
                events.append(formatter.event(sequence, None, num_sent, True))  # aborted
            if events:
                await stream.write(b"".join(events))
        await stream.end()
    return stream.response


class Formatter:
    """LightLLM's JSON for the tokens of one job; `texts` is what came so far in a stream."""

    def __init__(
        self, frontend: Frontend, job: Job, is_tgi: bool = False, has_details: bool = False
    ) -> None:
        self.texts: list[str] = []
        self._is_tgi, self._has_details = is_tgi, has_details
        self._vocabulary = frontend.tokenizer.vocabulary
        self._prompt = job.prompts[0]
        self._wants_prompt = job.spec.sampling.num_prompt_logprobs >= 0
        self.input_usage = {
            "input_text_tokens": len(self._prompt),
            "input_audio_tokens": 0,
            "input_image_tokens": 0,
        }

    def logprobs(self, entry: TokenLogprob | None) -> Json | None:
        """About a token and its likeliest rivals."""
        return named_logprobs(self._vocabulary, entry)

    def event(self, sequence: Sequence, piece: Piece | None, count: int, is_last: bool) -> bytes:
        """One event of a stream: `count` is the token's number; no piece: ended without one."""
        event: Json = {
            "token": self._token(piece, count),
            "generated_text": None,
            "finished": is_last,
            "finish_reason": sequence.finish_reason if is_last else None,
            "details": None,
            "input_usage": self.input_usage,
        }
        if is_last:
            event |= self.prompt_logprobs(sequence)
        if is_last and self._is_tgi:
            event["generated_text"] = "".join(self.texts)
            if self._has_details:
                event["details"] = {
                    "generated_tokens": count,
                    "finish_reason": sequence.finish_reason,
                    "prompt_tokens": len(self._prompt),
                }
        return _PREFIX + encode_json(event) + b"\n\n"

    def details(self, sequence: Sequence, pieces: list[Piece]) -> list[Json]:
        """`tokens` of return_details; cumlogprob is the running mean, as in LightLLM."""
        finished, result, total = sequence.finished, [], 0.0
        for count, piece in enumerate(pieces, 1):
            total += piece.logprob.logprob if piece.logprob else 0.0
            result.append(
                {
                    **self._token(piece, count),
                    "cumlogprob": total / count,
                    "prompt_cache_len": finished.num_cached_tokens if finished else 0,
                    "mtp_accepted_token_num": finished.mtp_accepted_tokens if finished else 0,
                }
            )
        return result

    def prompt_logprobs(self, sequence: Sequence) -> Json:
        """`prompt_token_ids` and `prompt_logprobs` when they were asked for."""
        if not self._wants_prompt:
            return {}
        entries = [None, *map(self.logprobs, sequence.prompt_logprobs)]
        return {"prompt_token_ids": self._prompt, "prompt_logprobs": entries}

    def _token(self, piece: Piece | None, count: int) -> Json:
        """What both forms say about token number `count`."""
        logprob = piece.logprob if piece else None
        return {
            "id": piece.token_id if piece else None,
            "text": piece.text if piece else "",
            "logprob": logprob.logprob if logprob else None,
            "special": piece is not None and piece.token_id in self._vocabulary.special_ids,
            "count_output_tokens": count,
            "prompt_tokens": len(self._prompt),
            "logprobs": self.logprobs(logprob),
        }


def named_logprobs(vocabulary: Vocabulary, entry: TokenLogprob | None) -> Json | None:
    """{token id: {logprob, rank, decoded_token}} for a token and its likeliest rivals."""
    if entry is None:
        return None

    def one(token_id: int, logprob: float, rank: int) -> Json:
        text = vocabulary.text(token_id)
        return {"logprob": logprob, "rank": rank or None, "decoded_token": text}

    found = {str(i): one(i, logprob, rank) for rank, (i, logprob) in enumerate(entry.top, 1)}
    found[str(entry.token_id)] = one(entry.token_id, entry.logprob, entry.rank)
    return found
