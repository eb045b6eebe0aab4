"""`--use_tgi_api`: /generate and /generate_stream in the words of text-generation-inference (TGI).

The sampling is LightLLM's; what TGI calls differently is renamed, what the model has no use for
(typical_p, truncate, watermark, ...) is ignored. The best of several samples is the one with the
highest mean log-probability.
"""

from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from ..context import Frontend
from ..wire.body import reply
from ..wire.schema import (
    GenerateBody,
    GenerateParameters,
    Samples,
    StopSequences,
    decode_body,
    spelled,
)
from .generate import Formatter, start, stream_events

Json = dict[str, Any]
_NAMES = {"parameters.best_of": "num_beam"}


class TgiParameters(GenerateParameters):
    """`parameters`: LightLLM's, and TGI's names for two of them."""

    details: bool | None = None
    stop: StopSequences | None = None
    best_of: Any = None  # this and the next: `num_beam` counts
    n: Any = None


class TgiBody(Struct):
    """Body of /generate and /generate_stream under `--use_tgi_api`."""

    inputs: str | list[int]
    parameters: TgiParameters | None = None
    num_beam: Samples | None = None
    multimodal_params: Json | None = None
    stream: bool | None = None  # read by / only


async def generate(frontend: Frontend, request: web.Request, data: bytes) -> web.StreamResponse:
    """POST /generate: all text at once."""
    return await _whole(frontend, request, decode_body(data, TgiBody))


async def generate_stream(
    frontend: Frontend, request: web.Request, data: bytes
) -> web.StreamResponse:
    """POST /generate_stream: one event per token, the last one with the whole text."""
    return await _stream(frontend, request, decode_body(data, TgiBody))


async def generate_either(
    frontend: Frontend, request: web.Request, data: bytes
) -> web.StreamResponse:
    """POST /: `stream` in the body chooses."""
    body = decode_body(data, TgiBody)
    return await (_stream if body.stream else _whole)(frontend, request, body)


def translate(body: TgiBody) -> GenerateBody:
    """The same wishes in LightLLM's terms."""
    given = body.parameters or TgiParameters()
    fields = msgspec.structs.asdict(given)
    details, stop = fields.pop("details"), fields.pop("stop")
    parameters = GenerateParameters(**{**fields, "best_of": body.num_beam or 1, "n": None})
    if parameters.return_details is None:
        parameters.return_details = details
    if parameters.stop_sequences is None:
        parameters.stop_sequences = stop
    return GenerateBody(body.inputs, parameters, body.multimodal_params)


async def _whole(frontend: Frontend, request: web.Request, body: TgiBody) -> web.StreamResponse:
    translated = translate(body)
    with spelled(_NAMES):
        opened = await start(frontend, request, translated)
    with opened as job:
        await job.run()
        formatter = Formatter(frontend, job)
        all_pieces = [sequence.stream.take_pieces() for sequence in job.sequences]
        tokens = [
            formatter.details(sequence, pieces)
            for sequence, pieces in zip(job.sequences, all_pieces, strict=True)
        ]
        beams: list[Json] = [
            {
                "generated_text": sequence.text,
                "finish_reason": sequence.finish_reason,
                "generated_tokens": sequence.stream.num_tokens,
                "logprob": entries[-1]["cumlogprob"] if entries else -9999.0,
            }
            for sequence, entries in zip(job.sequences, tokens, strict=True)
        ]
        best = max(range(len(beams)), key=lambda n: beams[n]["logprob"])
        result: Json = {"generated_text": beams[best]["generated_text"]}
        if translated.parameters and translated.parameters.return_details:
            result["details"] = {
                "generated_tokens": beams[best]["generated_tokens"],
                "finish_reason": beams[best]["finish_reason"],
                "tokens": tokens[best],
                "prompt_tokens": len(job.prompts[0]),
                "beam_sequences": beams,
            }
        result["logprobs"] = [formatter.logprobs(piece.logprob) for piece in all_pieces[best]]
        result |= formatter.prompt_logprobs(job.sequences[best])
    return reply([result] if frontend.config.return_list else result)


async def _stream(frontend: Frontend, request: web.Request, body: TgiBody) -> web.StreamResponse:
    with spelled(_NAMES):
        return await stream_events(frontend, request, translate(body), is_tgi=True)
