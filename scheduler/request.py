"""One request as the scheduler sees it, and the states it can be in.

Tokens are known (their values arrived) or only planned (a step that samples them was sent): with
look-ahead the plan runs ahead of the values. With drafts a step brings one token or more, so what
is planned is known within bounds only. Everything here is plain data; the decisions are in
`core.py`, `batch.py` and `admission.py`, the page bookkeeping in `memory.py`.
"""

import enum
import sys
from array import array

from ..shared.messages import Submit
from .radix import Node


class RequestState(enum.Enum):
    """Where a request is between Submit and Finished."""

    WAITING = "waiting"  # queued, never ran
    PREFILL = "prefill"  # has a row; some known tokens are not planned yet
    DECODE = "decode"  # has a row; every known token is planned, one more sampled per step
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


class Request:
    """State of one sequence. Attributes are grouped by who changes them. OverflowError if a
    prompt id has more than 32 bits."""

    __slots__ = (
        "arrival_ns",
        "cache_salt",
        "deadline_ns",
        "frontend",
        "grammar",
        "kv_capacity",
        "max_planned",
        "max_total_tokens",
        "node",
        "num_accepted",
        "num_cached_tokens",
        "num_kv",
        "num_logprob_positions",
        "num_planned",
        "num_prompt_tokens",
        "num_shared_pages",
        "num_tree_pages",
        "overtaken",
        "pages",
        "pages_needed",
        "pending",
        "priority",
        "publish_at",
        "queue_ns",
        "request_id",
        "row",
        "sampling",
        "sequence",
        "state",
        "stop_ids",
        "tokens",
        "uses_cache",
        "waits_for",
        "worker_losses",
    )

    def __init__(self, submit: Submit, sequence: int, now_ns: int, uses_cache: bool) -> None:
        self.request_id = submit.request_id
        self.frontend = submit.frontend
        self.sampling = submit.sampling
        self.stop_ids = frozenset(submit.sampling.stop_token_ids)
        self.cache_salt = submit.cache_salt
        self.grammar = submit.grammar
        self.uses_cache = uses_cache
        self.priority = submit.priority
        self.sequence = sequence  # arrival order, unique
        self.arrival_ns = now_ns
        self.deadline_ns = 0  # end of the queue wait; 0: none
        self.num_prompt_tokens = len(submit.prompt_ids)
        self.max_total_tokens = 0  # prompt + output; settled by admission

        self.state = RequestState.WAITING
        # Prompt and outputs whose values are known; 4 bytes each, invisible to the collector
        self.tokens = array("i", submit.prompt_ids)
        # Known tokens and those being sampled in flight: at least and, with all drafts accepted, at
        # most. The first is what the request will have for certain.
        self.num_planned = self.max_planned = len(self.tokens)
        # Positions whose KV is written by the plans sent so far; with drafts in flight the most it
        # can be. Never above kv_capacity: workers accept no draft that has no page.
        self.num_kv = 0
        self.num_accepted = 0  # outputs that were drafts
        self.row = -1
        self.num_logprob_positions = 1  # prompt logprobs sent for positions below; 0 has none

        # Page bookkeeping, owned by memory.py
        self.pages: list[int] = []
        self.kv_capacity = 0  # len(pages) * page_size
        self.num_shared_pages = 0  # of these, taken from the prefix cache at admission
        self.node: Node | None = None  # deepest prefix-cache node of this sequence, locked
        self.num_tree_pages = 0  # depth of `node`
        self.pending: list[Node] = []  # own nodes not yet planned, deepest first
        self.publish_at = sys.maxsize  # number of tokens that completes the next page

        # Queue bookkeeping, owned by core.py
        self.waits_for: Node | None = None  # a running request is about to fill this page
        self.pages_needed = 0  # pages that were missing at the last try
        self.overtaken = 0  # requests admitted past this one while it did not fit
        self.queue_ns = -1  # time to the first admission
        self.num_cached_tokens = 0  # at the first admission
        self.worker_losses = 0  # worker groups that died while this ran

    @property
    def num_output_tokens(self) -> int:
        """Output tokens whose values are known."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def results_in_flight(self) -> bool:
        """Whether a sent step will still bring a token."""
        return self.num_planned > len(self.tokens)

    @property
    def is_detached(self) -> bool:
        """Whether it gave up row and pages early and only its last result is missing."""
        return self.state is RequestState.LAST and self.row < 0

    @property
    def waits_for_prefix(self) -> bool:
        """Whether a running request is about to fill a page that this one could use."""
        return self.waits_for is not None and self.waits_for.is_coming

    @property
    def age_key(self) -> tuple[int, int]:
        """Order among running requests: the smallest is served first and preempted last."""
        return (self.priority, self.sequence)

    @property
    def queue_key(self) -> tuple[int, bool, int]:
        """Order in the queue: by priority, then those that already ran, then by arrival."""
        return (self.priority, self.state is RequestState.WAITING, self.sequence)

    def receive(self, num_tokens: int, width: int) -> None:
        """A step that could bring `width` tokens brings `num_tokens`: the bounds close in."""
        self.num_planned += num_tokens - 1
        self.max_planned -= width - num_tokens
        self.num_kv = min(self.num_kv, self.max_planned - 1)

    def lose_planned(self) -> None:
        """What is in flight will never arrive."""
        self.num_planned = self.max_planned = len(self.tokens)

    def move(self, state: RequestState) -> None:
        """Change state; only transitions in LEGAL_TRANSITIONS exist."""
        assert state in LEGAL_TRANSITIONS[self.state], (
            f"request {self.request_id}: {self.state.value} -> {state.value}"
        )
        self.state = state

    def matched_ids(self) -> list[int]:
        """Outputs that the grammar of this request has seen (see RowAdmit)."""
        return [] if self.grammar is None else self.tokens[self.num_prompt_tokens :].tolist()

    def counted_ids(self) -> list[int]:
        """Tokens that the penalties of this request count (see RowAdmit)."""
        if not self.sampling.uses_penalties:
            return []
        first = 0 if self.sampling.input_penalty else self.num_prompt_tokens
        return self.tokens[first:].tolist()
