"""Reading a StepResult: which token belongs to which request, and what ends with it."""

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


def fits(flight: Flight, result: StepResult) -> bool:
    """Whether a result has the shape that its plan asked for."""
    return (
        result.step == flight.step
        and len(result.rows) == len(flight.sampling)
        and len(result.prompt_logprobs) in (0, len(flight.chunks))
        and all(len(row.token_ids) == 1 for row in result.rows)
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
    )


class Outcome:
    """What a result brought: rows for each frontend, and the requests that end with it."""

    def __init__(self) -> None:
        self.rows: dict[int, list[TokenRow]] = {}  # by frontend
        self.ended: list[tuple[Request, str]] = []  # with the reason
        self.num_tokens = 0

    def add_tokens(self, sampling: list[Request], results: list[RowResult], memory: Memory) -> None:
        """Append each row's token to its request, unless that ended meanwhile (its extra step).
        Hot loop: every row, every step."""
        finished = RequestState.FINISHED
        rows, ended = self.rows, self.ended
        for request, result in zip(sampling, results, strict=True):
            if request.state is finished:
                continue
            self.num_tokens += 1
            token = result.token_ids[0]
            tokens = request.tokens
            tokens.append(token)
            row = TokenRow(request.request_id, result.token_ids, result.logprobs)
            if request.frontend in rows:
                rows[request.frontend].append(row)
            else:
                rows[request.frontend] = [row]
            if token in request.stop_ids:
                ended.append((request, "stop"))
            elif len(tokens) >= request.max_total_tokens:
                ended.append((request, "length"))
            elif len(tokens) >= request.publish_at:
                memory.publish(request)

    def add_prompt_logprobs(
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
