"""One request as the scheduler sees it, the states it can be in, and why it ends.

A token is *known* when its value has arrived, and *planned* when the step that samples it was sent.
Plans are sent ahead of results, so more tokens are planned than known. With drafts a step brings
one token or more: until its result is here, only bounds of the number of planned tokens are known.

This file is data. Decisions are made in `core.py`, `batch.py` and `admission.py`; the pages of a
request belong to `memory.py`.
"""

import enum
from array import array
from typing import NamedTuple

from ..shared.messages import Finished, Submit
from .memory import PageTable


class RequestState(enum.Enum):
    """Where a request is between Submit and Finished."""

    WAITING = "waiting"  # queued, never ran
    PREFILL = "prefill"  # has a row; some known tokens are not planned yet
    DECODE = "decode"  # has a row; every known token is planned, each step samples another one
    LAST = "last"  # its last token is planned; only results are missing
    PAUSED = "paused"  # ran, lost its pages (preempted, or the workers died), queued again
    FINISHED = "finished"


_S = RequestState
LEGAL_TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    _S.WAITING: frozenset({_S.PREFILL, _S.FINISHED}),
    _S.PREFILL: frozenset({_S.DECODE, _S.LAST, _S.PAUSED, _S.FINISHED}),
    _S.DECODE: frozenset({_S.LAST, _S.PAUSED, _S.FINISHED}),
    _S.LAST: frozenset({_S.PAUSED, _S.FINISHED}),
    _S.PAUSED: frozenset({_S.PREFILL, _S.FINISHED}),
    _S.FINISHED: frozenset(),
}


class Ending(NamedTuple):
    """Why a request ends: the fields of `Finished` that say so."""

    reason: str
    message: str = ""
    field: str = ""
    retry_after_s: float = 0.0


class Request:
    """State of one request. `arrival` numbers the requests in the order in which they came.
    Raises OverflowError if a prompt id has more than 32 bits."""

    def __init__(self, submit: Submit, arrival: int, now_ns: int, uses_cache: bool) -> None:
        self.request_id = submit.request_id
        self.frontend = submit.frontend
        self.sampling = submit.sampling
        self.grammar = submit.grammar
        self.tenant = submit.tenant
        self.priority = submit.priority
        self.arrival = arrival
        self.arrival_ns = now_ns
        self.deadline_ns = 0  # when its wait in the queue ends; 0: never
        self.stop_ids = frozenset(submit.sampling.stop_token_ids)
        self.num_prompt_tokens = len(submit.prompt_ids)
        self.max_total_tokens = 0  # prompt and output; set by admission

        self.state = RequestState.WAITING
        self.row = -1
        # Prompt and known outputs. An array takes 4 bytes per token, and the garbage collector
        # need not look into it.
        self.tokens = array("i", submit.prompt_ids)
        # Tokens known or planned: the least if no draft in flight is accepted, the most if all are.
        self.min_planned = self.max_planned = len(self.tokens)
        self.num_accepted = 0  # outputs that were drafts
        self.num_logprob_positions = 1  # prompt logprobs were sent for all positions below this
        self.table = PageTable(self.tokens, submit.cache_salt if uses_cache else None)
        # For the queue
        self.pages_needed = 0  # pages that were missing when it was last looked at
        self.overtaken = 0  # requests that started before this one while it did not fit
        self.queue_ns = -1  # time until it started first
        self.first_token_ns = -1  # when its first token came
        self.num_cached_tokens = 0  # found in the prefix cache when it started first
        self.worker_losses = 0  # worker groups that died while they ran it

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that are known."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def results_in_flight(self) -> bool:
        """Whether a step that was sent will bring another token."""
        return self.min_planned > len(self.tokens)

    @property
    def is_detached(self) -> bool:
        """Whether it gave up row and pages early and only its last result is missing."""
        return self.state is RequestState.LAST and self.row < 0

    @property
    def needs_page(self) -> bool:
        """Whether it decodes and its next token needs another page."""
        table = self.table
        is_full = table.num_kv == table.capacity < self.max_total_tokens - 1
        return is_full and self.state is RequestState.DECODE

    @property
    def age_key(self) -> tuple[int, int]:
        """Order among running requests: the smallest is served first and preempted last."""
        return (self.priority, self.arrival)

    @property
    def queue_key(self) -> tuple[int, bool, int]:
        """Order in the queue: by priority, then those that already ran, then by arrival."""
        return (self.priority, self.state is RequestState.WAITING, self.arrival)

    def receive(self, num_tokens: int, width: int) -> None:
        """A step that could bring up to `width` tokens brought `num_tokens`: adjust the bounds."""
        self.min_planned += num_tokens - 1
        self.max_planned -= width - num_tokens
        self.table.num_kv = min(self.table.num_kv, self.max_planned - 1)

    def lose_planned(self) -> None:
        """The results in flight will never arrive."""
        self.min_planned = self.max_planned = len(self.tokens)

    def move(self, state: RequestState) -> None:
        """Change state; only transitions in LEGAL_TRANSITIONS exist."""
        assert state in LEGAL_TRANSITIONS[self.state], (
            f"request {self.request_id}: {self.state.value} -> {state.value}"
        )
        self.state = state

    def finished_message(self, ending: Ending, now_ns: int) -> Finished:
        """The last message about this request, which ends now."""
        started_ns = now_ns if self.queue_ns < 0 else self.arrival_ns + self.queue_ns
        first_ns = now_ns if self.first_token_ns < 0 else self.first_token_ns
        return Finished(
            request_id=self.request_id,
            reason=ending.reason,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_cached_tokens=self.num_cached_tokens,
            message=ending.message,
            field=ending.field,
            retry_after_s=ending.retry_after_s,
            queue_s=(started_ns - self.arrival_ns) / 1e9,
            mtp_accepted_tokens=self.num_accepted,
            prefill_s=(first_ns - started_ns) / 1e9,
            decode_s=(now_ns - first_ns) / 1e9,
        )

    def output_ids(self) -> list[int]:
        """Outputs so far, for a grammar or a thinking budget of this request (see RowAdmit)."""
        if self.grammar is None and self.sampling.thinking_budget < 0:
            return []
        return self.tokens[self.num_prompt_tokens :].tolist()

    def counted_ids(self) -> list[int]:
        """Tokens that the penalties of this request count (see RowAdmit)."""
        if not self.sampling.uses_penalties:
            return []
        first = 0 if self.sampling.input_penalty else self.num_prompt_tokens
        return self.tokens[first:].tolist()
