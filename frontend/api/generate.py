"""LightLLM's routes: /generate, /generate_stream, and / which is either.

Greedy unless do_sample. The text is not templated, the stop text stays in the output, and a stream
has exactly one `data:` event per token (clients count them) and no [DONE].
"""

from collections.abc import Coroutine
from functools import partial
from typing import Any

from aiohttp import web

from ...shared.errors import HttpError
from ...shared.messages import TokenLogprob
from ..context import Frontend
from ..engine.job import Job, Reply, open_job
from ..engine.params import GenerationSpec, generate_spec
from ..text.detokenize import DecodedToken, TextStream, Vocabulary
from ..wire.body import Payload, encode_json, json_reply
from ..wire.schema import GenerateBody, GenerateParameters, Json, wrong
from ..wire.sse import error_json, stream_reply

Checked = tuple[GenerationSpec, str | list[int], bool]  # prompt, whether it gets special tokens
Opening = Coroutine[Any, Any, Job[TextStream]]  # submits a request


async def generate(
    frontend: Frontend, request: web.Request, payload: Payload
) -> web.StreamResponse:
    """POST /generate: all text at once."""
    body, opening = await _decode(frontend, request, payload)
    return await _whole(body, opening)


async def generate_stream(
    frontend: Frontend, request: web.Request, payload: Payload
) -> web.StreamResponse:
    """POST /generate_stream: one event per token."""
    return await stream_events(*await _decode(frontend, request, payload))


async def generate_either(
    frontend: Frontend, request: web.Request, payload: Payload
) -> web.StreamResponse:
    """POST /: /generate or /generate_stream, as `stream` in the body says."""
    body, opening = await _decode(frontend, request, payload)
    return await (stream_events if body.stream else _whole)(body, opening)


async def _decode(
    frontend: Frontend, request: web.Request, payload: Payload
) -> tuple[GenerateBody, Opening]:
    build = partial(check, frontend)
    body, checked = await payload.decode(GenerateBody, build, "inputs")
    return body, open_generate(frontend, request, checked)


def check(frontend: Frontend, body: GenerateBody) -> Checked:
    """Check the body. Raises RequestError."""
    spec = generate_spec(body, frontend.facts)
    if not isinstance(body.inputs, str):
        frontend.tokenizer.check_ids(body.inputs, "inputs")
    special = (body.parameters or GenerateParameters()).add_special_tokens is not False
    return spec, body.inputs, special


async def open_generate(
    frontend: Frontend, request: web.Request, checked: Checked
) -> Job[TextStream]:
    """Submit. Raises RequestError."""
    spec, prompt, special = checked
    if isinstance(prompt, str):
        max_total = frontend.client.max_req_total_len
        prompt = await frontend.tokenizer.encode(prompt, "inputs", max_total, special)
    make_stream = partial(TextStream, frontend.tokenizer.vocabulary, spec.text)
    return await open_job(frontend, request, [prompt], spec, make_stream, "inputs")


async def _whole(body: GenerateBody, opening: Opening) -> web.StreamResponse:
    with await opening as job:
        await job.run()
        return await json_reply(job, partial(_whole_reply, body, job))


def _whole_reply(body: GenerateBody, job: Job[TextStream]) -> Json:
    writer = GenerateWriter(job)
    outputs = [reply.stream.take() for reply in job.replies]
    result: Json = {
        "generated_text": [text for text, _ in outputs],
        "count_output_tokens": _unwrap([reply.stream.num_tokens for reply in job.replies]),
        "finish_reason": _unwrap([reply.finish_reason for reply in job.replies]),
        "prompt_tokens": job.prompt_lengths[0],
        "logprobs": _unwrap([writer.logprobs(tokens) for _, tokens in outputs]),
        "input_usage": writer.input_usage,
    }
    if body.parameters is not None and body.parameters.return_details:
        details = [
            writer.details(reply, tokens)
            for reply, (_, tokens) in zip(job.replies, outputs, strict=True)
        ]
        result["tokens"] = _unwrap(details)
    return result | writer.prompt_logprobs(job.replies[0])


def _unwrap(values: list[Any]) -> Any:
    """The only value, or the list if there are several."""
    return values if len(values) > 1 else values[0]


async def stream_events(
    body: GenerateBody, opening: Opening, is_tgi: bool = False
) -> web.StreamResponse:
    """The reply of /generate_stream. In TGI's format the last event has the whole text."""
    parameters = body.parameters or GenerateParameters()
    if (parameters.best_of or parameters.n or 1) != 1:
        opening.close()
        raise wrong("parameters.best_of", "must be 1 for streams")
    with await opening as job:
        return await stream_reply(job, GenerateWriter(job, is_tgi, bool(parameters.return_details)))


class GenerateWriter:
    """LightLLM's JSON for the tokens of one job."""

    opening = b""
    keep_alive = b""

    def __init__(
        self, job: Job[TextStream], is_tgi: bool = False, has_details: bool = False
    ) -> None:
        self._job, self._is_tgi, self._has_details = job, is_tgi, has_details
        self._vocabulary = job.frontend.tokenizer.vocabulary
        self._prompt = job.prompts[0] if job.prompts else []
        self._prompt_length = job.prompt_lengths[0]
        self._wants_prompt = job.spec.sampling.num_prompt_logprobs >= 0
        self._texts: list[str] = []  # all text so far, for TGI's last event
        self._num_sent = 0
        self.input_usage = {
            "input_text_tokens": self._prompt_length,
            "input_audio_tokens": 0,
            "input_image_tokens": 0,
        }

    def add(self, reply: Reply[TextStream]) -> bytes:
        """One event for each new token. A reply that was aborted ends with one without a token."""
        text, tokens = reply.stream.take()
        self._texts.append(text)
        events = []
        for token in tokens:
            is_last = token is tokens[-1] and reply.stream.finish_reason is not None
            self._num_sent += 1
            events.append(self._event(reply, token, is_last))
        if reply.finished is not None and reply.stream.finish_reason is None:
            events.append(self._event(reply, None, is_last=True))
        return b"".join(events)

    def end(self) -> bytes:
        """Nothing."""
        return b""

    def fail(self, error: HttpError) -> bytes:
        """The last event of a stream that breaks."""
        return b"data:" + error_json(error) + b"\n\n"

    def _event(self, reply: Reply[TextStream], token: DecodedToken | None, is_last: bool) -> bytes:
        event: Json = {
            "token": self._token(token, self._num_sent),
            "generated_text": None,
            "finished": is_last,
            "finish_reason": reply.finish_reason if is_last else None,
            "details": None,
            "input_usage": self.input_usage,
        }
        if is_last:
            event |= self.prompt_logprobs(reply)
        if is_last and self._is_tgi:
            event["generated_text"] = "".join(self._texts)
            if self._has_details:
                event["details"] = {
                    "generated_tokens": self._num_sent,
                    "finish_reason": reply.finish_reason,
                    "prompt_tokens": self._prompt_length,
                }
        return b"data:" + encode_json(event) + b"\n\n"

    def details(self, reply: Reply[TextStream], tokens: list[DecodedToken]) -> list[Json]:
        """`tokens` of return_details. cumlogprob is the running mean, as in LightLLM."""
        finished, result, total = reply.finished, [], 0.0
        for count, token in enumerate(tokens, 1):
            total += token.logprob.logprob if token.logprob else 0.0
            result.append(
                {
                    **self._token(token, count),
                    "cumlogprob": total / count,
                    "prompt_cache_len": self._job.cached_tokens(reply),
                    "mtp_accepted_token_num": finished.mtp_accepted_tokens if finished else 0,
                }
            )
        return result

    def logprobs(self, tokens: list[DecodedToken]) -> list[Json | None]:
        """For each token: its logprob and those of the most likely tokens."""
        return [named_logprobs(self._vocabulary, token.logprob) for token in tokens]

    def prompt_logprobs(self, reply: Reply[TextStream]) -> Json:
        """`prompt_token_ids` and `prompt_logprobs`, if they were requested."""
        if not self._wants_prompt:
            return {}
        entries = [named_logprobs(self._vocabulary, entry) for entry in reply.prompt_logprobs]
        return {"prompt_token_ids": self._prompt, "prompt_logprobs": [None, *entries]}

    def _token(self, token: DecodedToken | None, count: int) -> Json:
        """The fields about token number `count` that streams and details share."""
        logprob = token.logprob if token else None
        return {
            "id": token.token_id if token else None,
            "text": token.text if token else "",
            "logprob": logprob.logprob if logprob else None,
            "special": token is not None and token.token_id in self._vocabulary.special_ids,
            "count_output_tokens": count,
            "prompt_tokens": self._prompt_length,
            "logprobs": named_logprobs(self._vocabulary, logprob),
        }


def named_logprobs(vocabulary: Vocabulary, entry: TokenLogprob | None) -> Json | None:
    """{token id: {logprob, rank, decoded_token}} for a token and the most likely tokens."""
    if entry is None:
        return None
    ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, 1)]
    ranked.append((entry.token_id, entry.logprob, entry.rank))
    return {
        str(token_id): {
            "logprob": logprob,
            "rank": rank or None,
            "decoded_token": vocabulary.text(token_id),
        }
        for token_id, logprob, rank in ranked
    }
