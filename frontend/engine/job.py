"""One HTTP request on the engine: prompts in, the output of every sequence out, then its record.

`open_job` is what every generating route calls; `Job` is what it gets. The routes (`api/`) know
the wire formats, `client.py` knows the engine, and a stream turns token ids into text
(`text/detokenize.py`) or into the parts of a chat message (`chat/chat.py`).
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from aiohttp import web

from ...shared.errors import (
    ContextLengthError,
    EngineError,
    HttpError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from ...shared.messages import Finished, TokenLogprob
from ..context import CONTEXT, Frontend, clean_id
from ..wire.schema import wrong
from .client import Generation, SequenceOutput
from .constraints import ToolRules, constraint_for
from .metrics import RequestRecord
from .params import MAX_SEQUENCES, GenerationSpec

_MAX_IDS = 1 << 20  # that one request sends to the scheduler; encoding them takes some 10 ms
_PROMPTS_PER_TURN = 16  # others are served in between
_MANY_TOKENS, _MANY_LOGPROBS = 10_000, 2_000
_DISCONNECTED = 499  # the status of a request whose client has gone
_ID_BYTES, _LOGPROB_BYTES = 36, 130  # memory of one in a list
logger = logging.getLogger(__name__)


class Stream(Protocol):
    """Turns the tokens of one sequence into output: `TextStream`, or `ChatStream` on chat routes.

    Each has a `take` of its own, which returns the output that was not taken before.
    """

    max_new_tokens: int
    num_tokens: int
    num_reasoning_tokens: int
    finish_reason: str | None  # "stop" or "length", set with the token that ends the sequence
    must_abort: bool  # the stream has ended before the engine knows: it must be told

    def add(self, token_ids: list[int], logprobs: list[TokenLogprob]) -> None:
        """Add tokens. `logprobs` is parallel to them or empty."""
        ...

    def close(self, reason: str) -> None:
        """No more tokens follow: release what was held back. A second call does nothing."""
        ...


S = TypeVar("S", bound=Stream)


@dataclass
class Reply(Generic[S]):
    """One sequence of a request: its output stream and what the engine said about it."""

    index: int
    stream: S
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None  # the engine's last message about it

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length" or "abort" once the sequence has ended."""
        if self.stream.finish_reason is not None:
            return self.stream.finish_reason
        return self.finished.reason if self.finished else None


@dataclass(frozen=True)
class Usage:
    """Token counts of a request. Output and reasoning tokens are summed over its replies."""

    prompt_tokens: int  # a prompt counts once, whatever n
    output_tokens: int
    cached_tokens: int  # prompt tokens found in the prefix cache
    reasoning_tokens: int  # of the output tokens


async def open_job(
    frontend: Frontend,
    request: web.Request,
    prompts: list[list[int]],
    spec: GenerationSpec,
    make_stream: Callable[[int], S],
    prompt_field: str,
    tools: ToolRules | None = None,
) -> "Job[S]":
    """Check what constrains the output and that the prompts fit, and submit.

    `make_stream` gets the maximum number of new tokens. Raises RequestError for mistakes of the
    client (`prompt_field`: a prompt is empty or leaves no room for output), OverloadedError or
    UnavailableError when the request cannot be taken now.
    """
    if spec.output_format is not None or tools is not None:
        grammar = await constraint_for(frontend, spec, prompts, tools)
        spec = dataclasses.replace(spec, grammar=grammar)
    max_total = frontend.client.max_req_total_len
    if len(prompts) * spec.n > MAX_SEQUENCES:
        raise wrong("n", f"prompts times n exceed {MAX_SEQUENCES}")
    if len(prompts) * spec.n > 1:
        _check_total(prompts, spec, max_total, prompt_field)
    sequences, streams = [], []
    for n, prompt in enumerate(prompts, 1):
        if n % _PROMPTS_PER_TURN == 0 and spec.grammar is None:  # a grammar is not held yet
            await asyncio.sleep(0)
        if not 0 < len(prompt) < max_total:
            raise _prompt_error(prompt, max_total, prompt_field)
        for sample in range(spec.n):
            sampling = spec.for_sequence(sample, len(prompt), max_total)
            sequences.append((prompt, sampling))
            streams.append(make_stream(sampling.max_new_tokens))
    context = request[CONTEXT]
    if context.charge is not None:
        context.charge.take_prompts(prompts)
    salt, name = context.salt + spec.cache_salt, context.request_id
    generation = frontend.client.submit(
        sequences, spec.use_prefix_cache, salt, spec.grammar, name, context.tenant
    )
    context.drop()
    lengths = [len(prompt) for prompt in prompts]
    if spec.sampling.num_prompt_logprobs < 0:
        prompts = []
    context.hold(_ID_BYTES * sum(map(len, prompts)))
    replies = [Reply(index, stream) for index, stream in enumerate(streams)]
    submitted_s = _elapsed_s(request)
    context.job = Job(frontend, request, prompts, lengths, spec, generation, replies, submitted_s)
    return context.job


def _check_total(
    prompts: list[list[int]], spec: GenerationSpec, max_total: int, field: str
) -> None:
    """Raises RequestError when the sequences of one request have too many ids together."""
    biases = len(spec.sampling.allowed_token_ids) + len(spec.sampling.logit_bias)
    total = spec.n * sum(len(prompt) + biases for prompt in prompts)
    limit = max(_MAX_IDS, 8 * max_total)
    if total > limit:
        raise wrong(
            field,
            f"{total} token ids in all sequences of the request together, with those of "
            f"allowed_token_ids and logit_bias; at most {limit}",
        )


def _prompt_error(prompt: list[int], max_total: int, field: str) -> RequestError:
    if not prompt:
        return wrong(field, "must not be empty")
    return ContextLengthError(len(prompt), max_total, field)


def _elapsed_s(request: web.Request) -> float:
    """Seconds since the request arrived."""
    return time.monotonic() - request[CONTEXT].arrived_s


@dataclass
class Job(Generic[S]):
    """The replies to one HTTP request: n for each prompt, prompt by prompt. Made by `open_job`.

    Use as a `with` block: leaving it early aborts the sequences that still run.
    """

    frontend: Frontend
    request: web.Request
    prompts: list[list[int]]  # only if a reply repeats them
    prompt_lengths: list[int]
    spec: GenerationSpec
    generation: Generation
    replies: list[Reply[S]]
    submitted_s: float  # this and the next are durations since the request arrived
    first_token_s: float | None = None
    num_logprobs: int = 0  # received

    @property
    def is_large(self) -> bool:
        """Whether writing the replies as one takes long."""
        num_tokens = sum(reply.stream.num_tokens for reply in self.replies)
        return num_tokens > _MANY_TOKENS or self.num_logprobs > _MANY_LOGPROBS

    async def receive(self) -> list[Reply[S]]:
        """Wait for output; the replies that have some. Empty when nothing arrived for a long time.
        Raises the HttpError that fits when the engine failed one of them."""
        outputs = await self.generation.receive()
        if self.first_token_s is None and any(output.token_ids for output in outputs):
            self.first_token_s = _elapsed_s(self.request)
        return [self._add(output) for output in outputs]

    async def run(self) -> None:
        """Receive until the end. The streams keep the output."""
        while self.generation.is_open:
            await self.receive()

    def usage(self) -> Usage:
        """Counts so far; final when nothing is open."""
        firsts = self.replies[:: self.spec.n]
        return Usage(
            prompt_tokens=sum(self.prompt_lengths),
            output_tokens=sum(reply.stream.num_tokens for reply in self.replies),
            cached_tokens=sum(self.cached_tokens(reply) for reply in firsts),
            reasoning_tokens=sum(reply.stream.num_reasoning_tokens for reply in self.replies),
        )

    def cached_tokens(self, reply: Reply[S]) -> int:
        """Prompt tokens of a reply found in the prefix cache; 0 if they may be those of others."""
        if reply.finished is None or self.request[CONTEXT].hides_cached:
            return 0
        return reply.finished.num_cached_tokens

    def _add(self, output: SequenceOutput) -> Reply[S]:
        reply = self.replies[output.index]
        stream = reply.stream
        stream.add(output.token_ids, output.logprobs)
        if output.logprobs or output.prompt_logprobs:
            self._hold(output.logprobs + output.prompt_logprobs)
            reply.prompt_logprobs += output.prompt_logprobs
        if output.finished is not None:
            reply.finished = output.finished
            if stream.finish_reason is None:
                self._raise_if_failed(output.finished)
            stream.close(reply.finish_reason or "stop")
        elif stream.must_abort:
            stream.must_abort = False
            self.generation.abort(output.index)
        return reply

    def _hold(self, logprobs: list[TokenLogprob]) -> None:
        """Count log-probabilities, which are kept until the reply is written. Raises
        OverloadedError when they are too many."""
        num_logprobs = sum(1 + len(entry.top) for entry in logprobs)
        self.num_logprobs += num_logprobs
        context = self.request[CONTEXT]
        if context.stream is None:  # a stream writes them at once
            context.hold(_LOGPROB_BYTES * num_logprobs)

    def _raise_if_failed(self, finished: Finished) -> None:
        message = finished.message or f"the engine ended the request: {finished.reason}"
        retry_after_s = finished.retry_after_s or 1.0
        match finished.reason:
            case "stop" | "length" | "abort":
                return
            case "invalid":
                raise RequestError(message, field=finished.field or None)
            case "overloaded" if not self.frontend.client.state.draining:
                raise OverloadedError(message, retry_after_s=retry_after_s)
            case "overloaded" | "unavailable":
                raise UnavailableError(message, retry_after_s=retry_after_s)
        raise EngineError(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.generation.close()
        record, status = self._record(), 200 if value is None else _status(value)
        if value is None:
            self.frontend.metrics.observe(record)
        failure = "" if value is None else "abort" if status == _DISCONNECTED else "error"
        reasons = [failure or reply.finish_reason or "error" for reply in self.replies]
        self.frontend.metrics.end(reasons, status == _DISCONNECTED)
        if self.frontend.tracer is not None:
            self.frontend.tracer.trace(self, record, status)
        self._log(record, status)

    def _record(self) -> RequestRecord:
        now_s = _elapsed_s(self.request)
        usage = self.usage()
        ends = [reply.finished for reply in self.replies if reply.finished]
        accepted = sum(end.mtp_accepted_tokens for end in ends)
        return RequestRecord(
            submitted_s=self.submitted_s,
            first_token_s=now_s if self.first_token_s is None else self.first_token_s,
            total_s=now_s,
            queue_s=max((end.queue_s for end in ends), default=0.0),
            prefill_s=max((end.prefill_s for end in ends), default=0.0),
            decode_s=max((end.decode_s for end in ends), default=0.0),
            num_prompt_tokens=usage.prompt_tokens,
            num_output_tokens=usage.output_tokens,
            num_cached_tokens=usage.cached_tokens,
            max_new_tokens=self.replies[0].stream.max_new_tokens,
            tokens_per_step=usage.output_tokens / max(1, usage.output_tokens - accepted),
        )

    def _log(self, record: RequestRecord, status: int) -> None:
        """One line per request, in text with LightLLM's field names; never a prompt."""
        if not logger.isEnabledFor(logging.INFO):
            return
        reasons = ",".join(reply.finish_reason or "none" for reply in self.replies[:8])
        logger.info(
            "X-Request-Id:%s X-Session-Id:%s path:%s status:%d finish_reason:%s "
            "first_token_cost:%.1fms total_cost_time:%.1fms out_token_counter:%d "
            "mean_per_token_cost_time:%.2fms prompt_token_num:%d gpu_prompt_cache_len:%d "
            "gpu_prompt_cache_ratio:%.3f cpu_prompt_cache_len:0 cpu_prompt_cache_ratio:0.0 "
            "disk_prompt_cache_len:0 disk_prompt_cache_ratio:0.0 mtp_avg_token_per_step:%.2f",
            self.request[CONTEXT].request_id,
            clean_id(self.request.headers.get("X-Session-Id", "")),
            self.request.path,
            status,
            reasons,
            record.first_token_s * 1e3,
            record.total_s * 1e3,
            record.num_output_tokens,
            record.per_token_s * 1e3,
            record.num_prompt_tokens,
            record.num_cached_tokens,
            record.cache_ratio,
            record.tokens_per_step,
            extra={"fields": self._fields(record, status, reasons)},
        )

    def _fields(self, record: RequestRecord, status: int, reasons: str) -> dict[str, Any]:
        """The fields of the line in JSON. Times are in ms."""
        return {
            "message": "request ended",
            "route": self.request.path,
            "status": status,
            "finish_reason": reasons,
            "prompt_tokens": record.num_prompt_tokens,
            "cached_tokens": record.num_cached_tokens,
            "output_tokens": record.num_output_tokens,
            "queue_ms": round(record.queue_s * 1e3, 1),
            "ttft_ms": round(record.first_token_s * 1e3, 1),
            "tpot_ms": round(record.per_token_s * 1e3, 2),
            "total_ms": round(record.total_s * 1e3, 1),
        }


def _status(error: BaseException) -> int:
    """The HTTP status of a request that ended with this error."""
    if isinstance(error, asyncio.CancelledError | ConnectionError):
        return _DISCONNECTED
    return error.status if isinstance(error, HttpError) else 500
