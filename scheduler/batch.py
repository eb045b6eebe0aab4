"""One step: its plan is built here, and its result is read here.

A `StepBuilder` lives for one plan. It moves requests forward (states, tokens planned) as it adds
them. `core.py` decides which requests are offered to it, and in which order. A `SentStep` keeps
the requests of a plan until its result arrives; an `Outcome` reads the result.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from ..shared.config import ServeConfig
from ..shared.errors import ConfigError
from ..shared.messages import (
    PagesAppended,
    PrefillChunk,
    RowAdmit,
    RowResult,
    StepPlan,
    StepResult,
    TokenLogprob,
    TokenRow,
)
from .draft import DraftPolicy
from .memory import Memory
from .request import Ending, Request, RequestState


class StepLimits(NamedTuple):
    """Limits of one step."""

    max_rows: int
    max_tokens: int
    chunk_size: int
    whole_prompts: bool  # chunking is off: a prompt runs in one step or waits

    @classmethod
    def of(cls, config: ServeConfig) -> "StepLimits":
        """From a settled configuration. Raises ConfigError if it is not settled or not positive."""
        values = (
            config.running_max_req_size,
            config.batch_max_tokens,
            config.chunked_prefill_size or config.batch_max_tokens,
        )
        if any(value is None or value < 1 for value in values) or config.page_size < 1:
            raise ConfigError(
                "running_max_req_size, batch_max_tokens, chunked_prefill_size and page_size "
                f"must be positive, got {values} and {config.page_size}"
            )
        rows, tokens, chunk = (value or 0 for value in values)
        return cls(rows, tokens, chunk, config.disable_chunked_prefill)


# --- building a plan ------------------------------------------------------------------------


class SentStep(NamedTuple):
    """A plan that was sent, with the requests that it runs."""

    plan: StepPlan
    chunked: list[Request]  # parallel to plan.prefill
    sampling: list[Request]  # parallel to StepResult.rows: chunks that sample, then decode rows
    is_void: bool = False  # it builds on a step that failed; its result is not read

    def live_requests(self) -> list[Request]:
        """The requests that it runs, without those that have finished."""
        requests = {r.request_id: r for r in (*self.sampling, *self.chunked)}
        return [r for r in requests.values() if r.state is not RequestState.FINISHED]

    def sampled_chunks(self) -> list[Request]:
        """Those of `sampling` whose chunk was the last of their known tokens."""
        return self.sampling[: len(self.sampling) - len(self.plan.decode)]

    def widths(self) -> list[int]:
        """How many tokens each of `sampling` can bring."""
        num_decodes = len(self.plan.decode)
        chunks = [1] * (len(self.sampling) - num_decodes)
        return chunks + [1 + self.plan.num_drafts] * num_decodes


class StepBuilder:
    """Fills an empty plan. `budget` is the number of tokens that still fit."""

    def __init__(
        self, plan: StepPlan, memory: Memory, limits: StepLimits, drafts: DraftPolicy
    ) -> None:
        self._plan = plan
        self._memory = memory
        self._limits = limits
        self._drafts = drafts
        self.budget = limits.max_tokens
        self._num_drafts = 0
        self._num_spare_pages = 0  # for drafts: not needed by the next token of any row
        self._chunked: list[Request] = []  # parallel to plan.prefill
        self._sampled_chunks: list[Request] = []
        self._decoding: list[Request] = []  # parallel to plan.decode

    def add_running(self, running: list[Request]) -> None:
        """For each row that decodes one token and some drafts to verify, oldest first; then prompt
        chunks. Enough pages must be available for the next token of each row: see
        `Request.needs_page`. Hot loop: it runs for every row in every step."""
        decode, prefill = RequestState.DECODE, RequestState.PREFILL
        decoding = [request for request in running if request.state is decode]
        prefilling = [request for request in running if request.state is prefill]
        if self._drafts.longest:
            self._num_drafts = self._drafts.choose(len(decoding), self.budget)
            num_needed = sum(request.needs_page for request in decoding)
            self._num_spare_pages = self._memory.num_available - num_needed
        width = 1 + self._num_drafts
        budget = self.budget
        for request in decoding:
            if budget < width:
                break
            table = request.table
            num_kv = table.num_kv + width
            if num_kv > table.capacity:
                self._append_pages(request, num_kv)
                num_kv = min(num_kv, table.capacity)
            budget -= width
            table.num_kv = num_kv
            request.min_planned += 1
            request.max_planned += width
            self._plan.decode.append(request.row)
            self._decoding.append(request)
            if request.min_planned == request.max_total_tokens:
                request.move(RequestState.LAST)
        self.budget = budget
        for request in prefilling:
            self.add_chunk(request)

    def _append_pages(self, request: Request, num_kv: int) -> None:
        """Append pages until `num_kv` positions fit, but none behind the last token that is ever
        run. Drafts get only spare pages: a draft without a page is not accepted."""
        table = request.table
        num_kv = min(num_kv, request.max_total_tokens - 1)
        pages: list[int] = []
        while table.capacity < num_kv:
            if table.capacity > table.num_kv:  # there is a page for the next token
                if not self._num_spare_pages:
                    break
                self._num_spare_pages -= 1
            pages.append(self._memory.append_page(table))
        if pages:
            self._plan.appended.append(PagesAppended(request.row, pages))

    def can_chunk(self, num_tokens: int) -> bool:
        """Whether a request with `num_tokens` still to prefill would get a chunk now."""
        return self.budget >= (num_tokens if self._limits.whole_prompts else 1)

    def admit(self, request: Request) -> None:
        """Add a request that has just got its row and pages, and its first chunk."""
        admit = RowAdmit(
            row=request.row,
            sampling=request.sampling,
            pages=list(request.table.pages),
            num_cached_tokens=request.table.num_kv,
            num_output_tokens=request.num_output_tokens,
            counted_ids=request.counted_ids(),
            grammar=request.grammar,
            output_ids=request.output_ids(),
        )
        self._plan.admitted.append(admit)
        self.add_chunk(request)

    def add_chunk(self, request: Request) -> None:
        """Add the next prompt chunk of a row, as large as budget and chunk size allow."""
        start, tokens = request.table.num_kv, request.tokens
        num_left = len(tokens) - start
        limit = num_left if self._limits.whole_prompts else self._limits.chunk_size
        count = min(num_left, limit, self.budget)
        if count < 1 or (count < num_left and self._limits.whole_prompts):
            return
        end = start + count
        sample = end == len(tokens)
        next_id = -1 if sample else tokens[end]
        ids = tokens[start:end].tolist()
        chunk = PrefillChunk(request.row, start, ids, sample, next_id)
        self._plan.prefill.append(chunk)
        self._chunked.append(request)
        self.budget -= count
        request.table.num_kv = end
        if sample:
            self._sampled_chunks.append(request)
            request.min_planned += 1
            request.max_planned += 1
            is_last = request.min_planned == request.max_total_tokens
            request.move(RequestState.LAST if is_last else RequestState.DECODE)

    def build(self) -> SentStep | None:
        """The plan with its requests, or None if there is nothing to run."""
        plan = self._plan
        if not plan.decode and not plan.prefill:
            return None
        if self._drafts.longest and not plan.decode:  # rows make drafts with their first token
            num_rows = len(self._sampled_chunks)
            self._num_drafts = self._drafts.choose(num_rows, self._limits.max_tokens)
        for request in self._chunked:
            self._memory.publish_prefilled(request.table)
        plan = msgspec.structs.replace(plan, num_drafts=self._num_drafts)
        return SentStep(plan, self._chunked, self._sampled_chunks + self._decoding)


# --- reading a result -----------------------------------------------------------------------


def fits(sent: SentStep, result: StepResult) -> bool:
    """Whether a result has the shape that its plan asked for. A result that is not read needs only
    the right step number."""
    if result.step != sent.plan.step:
        return False
    if result.error or sent.is_void:
        return True
    num_logprobs = len(result.prompt_logprobs)
    if len(result.rows) != len(sent.sampling) or num_logprobs not in (0, len(sent.chunked)):
        return False
    rows = zip(sent.sampling, result.rows, sent.widths(), strict=True)
    return all(_row_fits(*row) for row in rows)


def _row_fits(request: Request, row: RowResult, width: int) -> bool:
    if row.error:
        return request.grammar is not None and not row.token_ids
    has_logprobs = not row.logprobs or len(row.logprobs) == len(row.token_ids)
    return has_logprobs and 0 < len(row.token_ids) <= width


@dataclass
class Outcome:
    """The effects of a result: rows for each frontend, and the requests that end with it."""

    rows: dict[int, list[TokenRow]] = field(default_factory=dict)  # by frontend
    ended: list[tuple[Request, Ending]] = field(default_factory=list)
    num_tokens: int = 0
    accepted: list[int] = field(default_factory=list)  # [n]: decode rows that accepted n drafts

    def add_tokens(self, sent: SentStep, results: list[RowResult], memory: Memory) -> None:
        """Append each row's tokens to its request, up to the one that ends it. Results of requests
        that have finished are dropped. Hot loop: it runs for every row in every step."""
        finished = RequestState.FINISHED
        num_drafts = sent.plan.num_drafts
        self.accepted = [0] * (1 + num_drafts) if num_drafts else [len(sent.plan.decode)]
        for request, result, width in zip(sent.sampling, results, sent.widths(), strict=True):
            if request.state is finished:
                continue
            if result.error:
                field = request.grammar.field if request.grammar else ""
                self.ended.append((request, Ending("invalid", result.error, field)))
                continue
            token_ids, logprobs, tokens = result.token_ids, result.logprobs, request.tokens
            num_known, reason = len(tokens), ""
            for token in token_ids:
                tokens.append(token)
                if token in request.stop_ids:
                    reason = "stop"
                    break
                if len(tokens) >= request.max_total_tokens:
                    reason = "length"
                    break
            if width > 1:
                self.accepted[len(token_ids) - 1] += 1
                request.receive(len(token_ids), width)
                count = len(tokens) - num_known
                request.num_accepted += count - 1
                if count < len(token_ids):
                    token_ids, logprobs = token_ids[:count], logprobs[:count]
            self.num_tokens += len(token_ids)
            row = TokenRow(request.request_id, token_ids, logprobs)
            self.rows.setdefault(request.frontend, []).append(row)
            if reason:
                self.ended.append((request, Ending(reason)))
            elif len(tokens) >= request.table.publish_at:
                memory.publish(request.table)

    def add_prompt_logprobs(self, sent: SentStep, result: StepResult) -> None:
        """Add the prompt logprobs of every chunk that asked for them."""
        chunks = zip(sent.chunked, sent.plan.prefill, result.prompt_logprobs, strict=False)
        for request, chunk, logprobs in chunks:
            if logprobs:
                self._add_chunk_logprobs(request, chunk.start, logprobs)

    def _add_chunk_logprobs(
        self, request: Request, start: int, logprobs: list[TokenLogprob]
    ) -> None:
        """Entry i is about position start + i; position 0 has none. A resumed request runs its
        prompt again. Log-probabilities that were sent before are not sent twice."""
        if request.sampling.num_prompt_logprobs < 0 or request.state is RequestState.FINISHED:
            return
        first = max(start, 1)
        end = min(first + len(logprobs), request.num_prompt_tokens)
        new = logprobs[max(0, request.num_logprob_positions - first) : max(0, end - first)]
        if new:
            request.num_logprob_positions = end
            row = TokenRow(request.request_id, [], [], new)
            self.rows.setdefault(request.frontend, []).append(row)
