"""Reading a StepResult: which token belongs to which request, and what ends with it."""

from collections.abc import Iterator
from itertools import chain, repeat
from typing import NamedTuple

from ..shared.messages import Finished, RowResult, StepResult, TokenLogprob, TokenRow
from .admission import Ending
from .memory import Memory
from .request import Request, RequestState


class Flight(NamedTuple):
    """What must be known of a sent plan to read its result."""

    step: int
    sampling: list[Request]  # parallel to StepResult.rows
    chunks: list[tuple[Request, int]]  # parallel to StepResult.prompt_logprobs: request, start
    num_decodes: int = 0  # of `sampling`, the last ones: rows that verify drafts
    num_drafts: int = 0
    is_void: bool = False  # sent before a step failed that it builds on

    def requests(self) -> list[Request]:
        """All live ones that the plan ran."""
        found = {r.request_id: r for r in (*self.sampling, *(r for r, _ in self.chunks))}
        return [r for r in found.values() if r.state is not RequestState.FINISHED]

    def widths(self) -> Iterator[int]:
        """How many tokens each of `sampling` can bring."""
        chunks = repeat(1, len(self.sampling) - self.num_decodes)
        return chain(chunks, repeat(1 + self.num_drafts, self.num_decodes))


def fits(flight: Flight, result: StepResult) -> bool:
    """Whether a result has the shape that its plan asked for, if it is to be read."""
    if result.error or flight.is_void:
        return result.step == flight.step
    first_decode = len(flight.sampling) - flight.num_decodes
    return (
        result.step == flight.step
        and len(result.rows) == len(flight.sampling)
        and len(result.prompt_logprobs) in (0, len(flight.chunks))
        and _are_right(result.rows[:first_decode], 1)
        and _are_right(result.rows[first_decode:], 1 + flight.num_drafts)
    )


def _are_right(rows: list[RowResult], width: int) -> bool:
    return all(
        0 < len(row.token_ids) <= width
        and (not row.logprobs or len(row.logprobs) == len(row.token_ids))
        for row in rows
    )


def finished_message(request: Request, ending: Ending, now_ns: int) -> Finished:
    """The last word about a request that ends now."""
    waited_ns = now_ns - request.arrival_ns
    return Finished(
        request_id=request.request_id,
        reason=ending.reason,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_output_tokens,
        num_cached_tokens=request.num_cached_tokens,
        message=ending.message,
        field=ending.field,
        retry_after_s=ending.retry_after_s,
        queue_s=(waited_ns if request.queue_ns < 0 else request.queue_ns) / 1e9,
        mtp_accepted_tokens=request.num_accepted,
    )


class Outcome:
    """What a result brought: rows for each frontend, and the requests that end with it."""

    def __init__(self) -> None:
        self.rows: dict[int, list[TokenRow]] = {}  # by frontend
        self.ended: list[tuple[Request, str]] = []  # with the reason
        self.num_tokens = 0
        self.accepted: list[int] = []  # [n]: rows that accepted n drafts

    def add_tokens(self, flight: Flight, results: list[RowResult], memory: Memory) -> None:
        """Append each row's tokens to its request, up to the one that ends it, unless that ended
        before (its extra step). Hot loop: every row, every step."""
        finished = RequestState.FINISHED
        rows, ended = self.rows, self.ended
        self.accepted = [0] * (1 + flight.num_drafts) if flight.num_drafts else [flight.num_decodes]
        for request, result, width in zip(flight.sampling, results, flight.widths(), strict=True):
            if request.state is finished:
                continue
            token_ids, logprobs, tokens = result.token_ids, result.logprobs, request.tokens
            first, reason = len(tokens), ""
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
                count = len(tokens) - first
                request.num_accepted += count - 1
                if count < len(token_ids):
                    token_ids, logprobs = token_ids[:count], logprobs[:count]
            self.num_tokens += len(token_ids)
            row = TokenRow(request.request_id, token_ids, logprobs)
            if request.frontend in rows:
                rows[request.frontend].append(row)
            else:
                rows[request.frontend] = [row]
            if reason:
                ended.append((request, reason))
            elif len(tokens) >= request.publish_at:
                memory.publish(request)

    def add_prompt_logprobs(self, flight: Flight, result: StepResult) -> None:
        """Those of every chunk that asked for them."""
        for (request, start), logprobs in zip(flight.chunks, result.prompt_logprobs, strict=False):
            self._add_chunk_logprobs(request, start, logprobs)

    def _add_chunk_logprobs(
        self, request: Request, start: int, logprobs: list[TokenLogprob]
    ) -> None:
        """Those of the chunk at `start`: entry i is about position start + i (0 has none). A
        resumed request computes its prompt again: what was sent, and outputs, are left out."""
        if request.sampling.num_prompt_logprobs < 0 or request.state is RequestState.FINISHED:
            return
        first = max(start, 1)
        end = min(first + len(logprobs), request.num_prompt_tokens)
        new = logprobs[max(0, request.num_logprob_positions - first) : max(0, end - first)]
        if new:
            request.num_logprob_positions = end
            row = TokenRow(request.request_id, [], [], new)
            self.rows.setdefault(request.frontend, []).append(row)
