"""One HTTP request while it is generated: prompts in, text of every sequence out, then its record.

Between the routes (`generate.py`, `openai.py`, `completions.py`), which know the wire formats, and
`client.py`, which knows the engine.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from aiohttp import web

from ...shared.errors import EngineError, HttpError, OverloadedError, RequestError, UnavailableError
from ...shared.messages import Finished, TokenLogprob
from ..context import CONTEXT, Frontend, clean_id
from ..text.detokenize import Piece, TextStream
from ..wire.schema import wrong
from .client import Event
from .metrics import RequestRecord
from .params import MAX_SEQUENCES, GenerationSpec

logger = logging.getLogger(__name__)


class Stream(Protocol):
    """What takes a sequence's tokens: `TextStream`, or `ChatStream` on the chat routes."""

    max_new_tokens: int
    num_tokens: int
    finish_reason: str | None
    must_abort: bool

    def add(self, token_ids: list[int], logprobs: list[TokenLogprob]) -> str:
        """Take tokens; the text that may be sent now."""
        ...

    def finish(self) -> str:
        """The text that was still held back."""
        ...

    def take_pieces(self) -> list[Piece]:
        """Recorded tokens that were not taken before."""
        ...


@dataclass
class Sequence:
    """One sequence of a request and what is known about it so far."""

    index: int
    stream: Stream
    text: str = ""  # new since the last `Job.receive`
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None  # the engine's last word

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length" or "abort" once the sequence has ended."""
        if self.stream.finish_reason is not None:
            return self.stream.finish_reason
        return self.finished.reason if self.finished else None


class Job:
    """The sequences of one HTTP request: n for each prompt, prompt by prompt.

    Use as a `with` block: leaving it early aborts what is still running. `make_stream` makes what
    takes the tokens of a sequence, given the most that may come (default: `TextStream`).
    Raises RequestError (field `prompt_field`) when a prompt is empty or leaves no room for output.
    """

    def __init__(
        self,
        frontend: Frontend,
        request: web.Request,
        prompts: list[list[int]],
        spec: GenerationSpec,
        prompt_field: str,
        make_stream: Callable[[int], Stream] | None = None,
    ) -> None:
        self.prompts = prompts
        self.spec = spec
        self._frontend, self._request = frontend, request
        self._arrived_s = request[CONTEXT].arrived_s
        max_total = frontend.client.max_req_total_len
        if len(prompts) * spec.n > MAX_SEQUENCES:
            raise wrong("n", f"prompts times n exceed {MAX_SEQUENCES}")
        for prompt in prompts:
            _check_prompt(prompt, max_total, prompt_field)
        sampling = [
            (prompt, spec.for_sequence(sample, len(prompt), max_total))
            for prompt in prompts
            for sample in range(spec.n)
        ]
        vocabulary = frontend.tokenizer.vocabulary
        make = make_stream or (lambda max_new: TextStream(vocabulary, spec.text, max_new))
        self.sequences = [
            Sequence(index, make(one.max_new_tokens)) for index, (_, one) in enumerate(sampling)
        ]
        self._generation = frontend.client.submit(
            sampling, spec.use_prefix_cache, spec.cache_salt, spec.grammar
        )
        if spec.grammar is not None:
            frontend.grammars.hold(spec.grammar.name)
        self._generation.name = request[CONTEXT].request_id
        self._submitted_s = time.monotonic() - self._arrived_s
        self._first_token_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether more is to come."""
        return self._generation.is_open

    async def receive(self) -> list[Sequence]:
        """Wait for news; the sequences that have some, their `text` set. Empty after a long wait.
        Raises the HttpError that fits when the engine failed one of them."""
        events = await self._generation.receive()
        if self._first_token_s is None and any(event.token_ids for event in events):
            self._first_token_s = time.monotonic() - self._arrived_s
        return [self._take(event) for event in events]

    async def run(self) -> None:
        """Receive until the end, keeping all text in the sequences' `text`."""
        texts: list[list[str]] = [[] for _ in self.sequences]
        while self.is_open:
            for sequence in await self.receive():
                texts[sequence.index].append(sequence.text)
        for sequence in self.sequences:
            sequence.text = "".join(texts[sequence.index])

    def usage(self) -> tuple[int, int, int]:
        """Prompt tokens, output tokens, prompt tokens found in the prefix cache. A prompt counts
        once, whatever n."""
        firsts = self.sequences[:: self.spec.n]
        return (
            sum(len(prompt) for prompt in self.prompts),
            sum(sequence.stream.num_tokens for sequence in self.sequences),
            sum(s.finished.num_cached_tokens for s in firsts if s.finished),
        )

    def _take(self, event: Event) -> Sequence:
        sequence = self.sequences[event.index]
        stream = sequence.stream
        sequence.text = stream.add(event.token_ids, event.logprobs)
        sequence.prompt_logprobs += event.prompt_logprobs
        if event.finished is not None:
            sequence.finished = event.finished
            if stream.finish_reason is None:  # ended for a reason of the engine's
                self._raise_if_failed(event.finished)
                sequence.text += stream.finish()
        elif stream.must_abort:
            stream.must_abort = False
            self._generation.abort(event.index)
        return sequence

    def _raise_if_failed(self, finished: Finished) -> None:
        message = finished.message or f"the engine ended the request: {finished.reason}"
        retry_after_s = finished.retry_after_s or 1.0
        match finished.reason:
            case "stop" | "length" | "abort":
                return
            case "invalid":
                raise RequestError(message, field=finished.field or None)
            case "overloaded" if not self._frontend.client.state.draining:
                raise OverloadedError(message, retry_after_s=retry_after_s)
            case "overloaded" | "unavailable":
                raise UnavailableError(message, retry_after_s=retry_after_s)
        raise EngineError(message)

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._generation.__exit__(kind, value, tb)
        if self.spec.grammar is not None:
            self._frontend.grammars.release(self.spec.grammar.name)
        record = self._record()
        status = 200
        if isinstance(value, asyncio.CancelledError | ConnectionError):
            status = 499  # the client has gone
        elif value is not None:
            status = value.status if isinstance(value, HttpError) else 500
        else:
            self._frontend.metrics.observe(record)
        self._log(record, status)

    def _record(self) -> RequestRecord:
        now_s = time.monotonic() - self._arrived_s
        prompt_tokens, output_tokens, cached_tokens = self.usage()
        ends = [s.finished for s in self.sequences if s.finished]
        accepted = sum(end.mtp_accepted_tokens for end in ends)
        return RequestRecord(
            submitted_s=self._submitted_s,
            first_token_s=now_s if self._first_token_s is None else self._first_token_s,
            total_s=now_s,
            queue_s=max((end.queue_s for end in ends), default=0.0),
            num_prompt_tokens=prompt_tokens,
            num_output_tokens=output_tokens,
            num_cached_tokens=cached_tokens,
            max_new_tokens=self.sequences[0].stream.max_new_tokens,
            tokens_per_step=output_tokens / max(1, output_tokens - accepted),
        )

    def _log(self, record: RequestRecord, status: int) -> None:
        """One line per request, with the field names of LightLLM's; never a prompt."""
        logger.info(
            "X-Request-Id:%s X-Session-Id:%s path:%s status:%d finish_reason:%s "
            "first_token_cost:%.1fms total_cost_time:%.1fms out_token_counter:%d "
            "mean_per_token_cost_time:%.2fms prompt_token_num:%d gpu_prompt_cache_len:%d "
            "gpu_prompt_cache_ratio:%.3f cpu_prompt_cache_len:0 cpu_prompt_cache_ratio:0.0 "
            "disk_prompt_cache_len:0 disk_prompt_cache_ratio:0.0 mtp_avg_token_per_step:%.2f",
            self._request[CONTEXT].request_id,
            clean_id(self._request.headers.get("X-Session-Id", "")),
            self._request.path,
            status,
            ",".join(sequence.finish_reason or "none" for sequence in self.sequences[:8]),
            record.first_token_s * 1e3,
            record.total_s * 1e3,
            record.num_output_tokens,
            record.per_token_s * 1e3,
            record.num_prompt_tokens,
            record.num_cached_tokens,
            record.cache_ratio,
            record.tokens_per_step,
        )


def _check_prompt(prompt: list[int], max_total: int, field: str) -> None:
    if not prompt:
        raise wrong(field, "must not be empty")
    if len(prompt) >= max_total:
        raise wrong(
            field,
            f"{len(prompt)} tokens, but prompt and output together may have at most {max_total} "
            "(context_length_exceeded)",
        )
