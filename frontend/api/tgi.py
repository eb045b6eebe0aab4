"""`--use_tgi_api`: /generate and /generate_stream in the format of text-generation-inference (TGI).

The sampling is LightLLM's. Fields with other names in TGI are renamed; fields without a meaning for
the model (typical_p, truncate, watermark, ...) are ignored. The best of several samples is the one
with the highest mean log-probability.
"""

from functools import partial
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from ..context import Frontend
from ..engine.job import Job
from ..text.detokenize import TextStream
from ..wire.body import Payload, json_reply
from ..wire.schema import (
    GenerateBody,
    GenerateParameters,
    Json,
    Samples,
    StopSequences,
    spelled,
)
from .generate import Checked, GenerateWriter, check, open_generate, stream_events

_NAMES = {"parameters.best_of": "num_beam"}


class TgiParameters(GenerateParameters):
    """`parameters`: LightLLM's, and TGI's names of two of them."""

    details: bool | None = None
    stop: StopSequences | None = None
    best_of: Any = None  # this and the next are ignored: `num_beam` counts
    n: Any = None


class TgiBody(Struct):
    """Body of /generate and /generate_stream under `--use_tgi_api`."""

    inputs: str | list[int]
    parameters: TgiParameters | None = None
    num_beam: Samples | None = None
    multimodal_params: Json | None = None
    stream: bool | None = None  # read by / only


async def generate(
    frontend: Frontend, request: web.Request, payload: Payload
) -> web.StreamResponse:
    """POST /generate: all text at once."""
    return await _reply(frontend, request, payload, stream=False)


async def generate_stream(
    frontend: Frontend, request: web.Request, payload: Payload
) -> web.StreamResponse:
    """POST /generate_stream: one event per token, the last one with the whole text."""
    return await _reply(frontend, request, payload, stream=True)


async def generate_either(
    frontend: Frontend, request: web.Request, payload: Payload
) -> web.StreamResponse:
    """POST /: /generate or /generate_stream, as `stream` in the body says."""
    return await _reply(frontend, request, payload, stream=None)


def translate(body: TgiBody) -> GenerateBody:
    """The same request in LightLLM's terms."""
    fields = msgspec.structs.asdict(body.parameters or TgiParameters())
    details, stop = fields.pop("details"), fields.pop("stop")
    parameters = GenerateParameters(**{**fields, "best_of": body.num_beam or 1, "n": None})
    if parameters.return_details is None:
        parameters.return_details = details
    if parameters.stop_sequences is None:
        parameters.stop_sequences = stop
    return GenerateBody(body.inputs, parameters, body.multimodal_params)


async def _reply(
    frontend: Frontend, request: web.Request, payload: Payload, stream: bool | None
) -> web.StreamResponse:
    """`stream` None: as the body says."""

    def build(body: TgiBody) -> tuple[GenerateBody, Checked]:
        translated = translate(body)
        checked = check(frontend, translated)
        translated.inputs = ""
        return translated, checked

    with spelled(_NAMES):
        body, (translated, checked) = await payload.decode(TgiBody, build, "inputs")
        opening = open_generate(frontend, request, checked)
        del checked
        if body.stream if stream is None else stream:
            return await stream_events(translated, opening, is_tgi=True)
        opened = await opening
    with opened as job:
        await job.run()
        return await json_reply(job, partial(_whole_reply, translated, job))


def _whole_reply(body: GenerateBody, job: Job[TextStream]) -> Any:
    writer = GenerateWriter(job)
    beams: list[Json] = []
    details = []
    logprobs = []
    for reply in job.replies:
        text, tokens = reply.stream.take()
        details.append(writer.details(reply, tokens))
        logprobs.append(writer.logprobs(tokens))
        beams.append(
            {
                "generated_text": text,
                "finish_reason": reply.finish_reason,
                "generated_tokens": reply.stream.num_tokens,
                "logprob": details[-1][-1]["cumlogprob"] if tokens else -9999.0,
            }
        )
    best = max(range(len(beams)), key=lambda n: beams[n]["logprob"])
    result: Json = {"generated_text": beams[best]["generated_text"]}
    if body.parameters and body.parameters.return_details:
        result["details"] = {
            "generated_tokens": beams[best]["generated_tokens"],
            "finish_reason": beams[best]["finish_reason"],
            "tokens": details[best],
            "prompt_tokens": job.prompt_lengths[0],
            "beam_sequences": beams,
        }
    result["logprobs"] = logprobs[best]
    result |= writer.prompt_logprobs(job.replies[best])
    return [result] if job.frontend.config.return_list else result
