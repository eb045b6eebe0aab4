"""Who may enter the queue, who may start, and who must give way.

Requests start as long as the *expected* peak of KV use fits. The expectation comes from the lengths
of outputs that finished recently, not from `max_new_tokens`, which clients often set huge. When it
was too low, requests are preempted (`choose_victim`).
"""

import math
import sys
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Protocol

from ..shared.config import ServeConfig
from ..shared.messages import Submit
from .memory import Memory
from .request import Ending, Request, RequestState

_FIRST_GUESS = 2048  # expected output tokens before anything has finished, or
_FIRST_SHARE = 1 / 16  # this share of all KV tokens if that is less
_LEARNING_RATE = 0.05
_MAX_RETRY_S = 60.0
_MAX_INTERVAL_NS = 10_000_000_000
_SHARE_OF_FREE = 4  # one user alone can fill 4/5 of the queue
_QUEUE_KEY = attrgetter("queue_key")


class WaitingQueue:
    """Requests without a row, in the order in which they should start: `Request.queue_key`."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._next_deadline_ns = 0  # no wait ends before this; 0: none ends at all
        self.num_tokens = 0  # prompt tokens of the requests in the queue

    def __len__(self) -> int:
        return len(self._requests)

    def first(self, count: int) -> Sequence[Request]:
        """A copy of the first `count` requests."""
        return self._requests[:count]

    def push(self, request: Request) -> None:
        """Insert a request in order."""
        insort(self._requests, request, key=_QUEUE_KEY)
        self.num_tokens += request.num_prompt_tokens
        deadline = request.deadline_ns
        if deadline and (not self._next_deadline_ns or deadline < self._next_deadline_ns):
            self._next_deadline_ns = deadline

    def remove(self, request: Request) -> None:
        """Take a request out; its state must still be the one it was pushed with."""
        index = bisect_left(self._requests, request.queue_key, key=_QUEUE_KEY)
        assert self._requests[index] is request, "the queue lost its order"
        del self._requests[index]
        self.num_tokens -= request.num_prompt_tokens

    def share_of(self, tenant: str) -> tuple[int, int]:
        """Requests of a user in the queue, and their prompt tokens. All requests are one user's:
        `FairQueue` has a queue for each."""
        return len(self._requests), self.num_tokens

    def expired(self, now_ns: int) -> list[Request]:
        """Requests whose wait is over. They stay in the queue until they are removed."""
        if not self._next_deadline_ns or now_ns < self._next_deadline_ns:
            return []
        expired = [r for r in self._requests if r.deadline_ns and r.deadline_ns <= now_ns]
        later = [r.deadline_ns for r in self._requests if r.deadline_ns > now_ns]
        self._next_deadline_ns = min(later, default=0)
        return expired

    def check_integrity(self) -> list[Request]:
        """All requests, in order. Raise AssertionError if order or token count are wrong."""
        keys = [r.queue_key for r in self._requests]
        assert keys == sorted(keys), "the queue is not sorted"
        num_tokens = sum(r.num_prompt_tokens for r in self._requests)
        assert self.num_tokens == num_tokens, "tokens in the queue"
        has_row = any(r.row >= 0 or r.table.pages for r in self._requests)
        assert not has_row, "queued but has a row"
        return self._requests.copy()


class Queue(Protocol):
    """A `WaitingQueue`, or a `FairQueue` of several of them."""

    @property
    def num_tokens(self) -> int: ...
    def __len__(self) -> int: ...
    def share_of(self, tenant: str) -> tuple[int, int]: ...
    def push(self, request: Request) -> None: ...


class Admission:
    """Limits of the queue and of one request, and what was learned about lengths and speed."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._expected_output = float(_FIRST_GUESS)
        self._num_outputs = 0  # learned from so far
        self._last_start_ns: int | None = None  # None: the queue was empty after the last start
        self._start_interval_ns = 1e9  # moving average of the time between two starts
        self.draining = False
        self.max_req_total_len = config.max_req_total_len or sys.maxsize

    # --- limits --------------------------------------------------------------------------

    def settle_limit(self, num_pages: int) -> None:
        """The workers hold `num_pages`. Any one request must fit with a page to spare; without
        chunking, its whole prompt (and its outputs, when it is resumed) must fit one step."""
        config = self._config
        limit = (num_pages - 1) * config.page_size
        if config.max_req_total_len is not None:
            limit = min(limit, config.max_req_total_len)
        if config.disable_chunked_prefill and config.batch_max_tokens is not None:
            limit = min(limit, config.batch_max_tokens)
        self.max_req_total_len = limit
        if not self._num_outputs:
            share = num_pages * config.page_size * _FIRST_SHARE
            self._expected_output = min(float(_FIRST_GUESS), share)

    def fit_length(self, request: Request) -> Ending | None:
        """Set the request's longest total length. Returns an Ending if it can never run."""
        limit = self.max_req_total_len
        num_prompt, max_new = request.num_prompt_tokens, request.sampling.max_new_tokens
        if max_new < 1:
            return Ending("invalid", f"max_new_tokens is {max_new}, minimum 1", "max_new_tokens")
        if num_prompt < 1:
            return Ending("invalid", "the prompt is empty", "inputs")
        if num_prompt >= limit:
            text = f"the prompt has {num_prompt} tokens; prompt and output together may have "
            return Ending("invalid", f"{text}{limit} (max_req_total_len)", "inputs")
        request.max_total_tokens = min(num_prompt + max_new, limit)
        if len(request.tokens) >= request.max_total_tokens:  # resumed under a lower limit
            return Ending("length")
        return None

    def refuse(self, request: Request, waiting: Queue) -> Ending | None:
        """Returns an Ending for a new request that must not enter the queue."""
        if self.draining:
            return Ending("overloaded", "the server is shutting down", retry_after_s=1.0)
        if ending := self.fit_length(request):
            return ending
        num_waiting = len(waiting)
        if num_waiting >= self._config.max_queued_requests:
            return self._overloaded(f"{num_waiting} requests are waiting", num_waiting)
        num_tokens = waiting.num_tokens + request.num_prompt_tokens
        if num_waiting and num_tokens > self._config.max_queued_tokens:
            return self._overloaded(f"{waiting.num_tokens} prompt tokens are waiting", num_waiting)
        return self._exceeds_share(request, waiting) if request.tenant else None

    def _exceeds_share(self, request: Request, waiting: Queue) -> Ending | None:
        """One user may take a multiple of what is free, so some always stays free for others."""
        num_own, own_tokens = waiting.share_of(request.tenant)
        num_free = self._config.max_queued_requests - len(waiting)
        free_tokens = self._config.max_queued_tokens - waiting.num_tokens
        if num_own >= _SHARE_OF_FREE * num_free:
            return self._overloaded(f"{num_own} requests of this key are waiting", num_own)
        own_tokens += request.num_prompt_tokens
        if num_own and own_tokens > _SHARE_OF_FREE * free_tokens:
            return self._overloaded("too many prompt tokens of this key are waiting", num_own)
        return None

    def timed_out(self, num_waiting: int) -> Ending:
        """The Ending of a request that waited too long."""
        return self._overloaded("no capacity became free in time", num_waiting)

    def _overloaded(self, message: str, num_waiting: int) -> Ending:
        wait_s = math.ceil(num_waiting * self._start_interval_ns / 1e9)
        return Ending("overloaded", message, retry_after_s=min(max(1.0, wait_s), _MAX_RETRY_S))

    def uses_cache(self, submit: Submit) -> bool:
        """Whether the prefix cache serves it. Prompt logprobs need the whole prompt computed."""
        is_on = not self._config.disable_dynamic_prompt_cache
        return is_on and submit.use_prefix_cache and submit.sampling.num_prompt_logprobs < 0

    def queue_timeout_ns(self, submit: Submit) -> int:
        """How long a request may wait: its own limit, or the server's default; 0: no limit."""
        timeout_s = submit.timeout_s if submit.timeout_s > 0 else self._config.queue_timeout_s
        return int(timeout_s * 1e9)

    # --- learning ------------------------------------------------------------------------

    def observe_start(self, now_ns: int, num_waiting: int) -> None:
        """A request left the queue and `num_waiting` stayed: learn how fast the queue drains."""
        if self._last_start_ns is not None:
            interval = min(now_ns - self._last_start_ns, _MAX_INTERVAL_NS)
            self._start_interval_ns += _LEARNING_RATE * (interval - self._start_interval_ns)
        self._last_start_ns = now_ns if num_waiting else None

    def observe_output(self, num_tokens: int) -> None:
        """A request ended by itself: learn how long outputs are."""
        self._num_outputs += 1
        rate = max(_LEARNING_RATE, 1 / (self._num_outputs + 1))
        self._expected_output += rate * (num_tokens - self._expected_output)

    def expected_growth(self, request: Request) -> int:
        """Expected tokens still to come. At least a page, so that a row that has just started is
        not preempted at once."""
        num_outputs = request.num_output_tokens
        longest = request.max_total_tokens - len(request.tokens)
        guess = max(self._expected_output - num_outputs, num_outputs / 8, self._config.page_size)
        return min(longest, int(guess))


@dataclass
class Forecast:
    """Expected KV use of the running requests. They are looked at once, when first needed; `add`
    takes in requests that start in the same step."""

    admission: Admission
    memory: Memory
    running: Sequence[Request]

    @cached_property
    def rows(self) -> list[tuple[int, int]]:
        """(expected growth, tokens of pages not shared) of each request."""
        return [self._row(request) for request in self.running]

    @cached_property
    def growth(self) -> int:
        """Tokens that all of them are expected to grow by."""
        return sum(growth for growth, _ in self.rows)

    def _row(self, request: Request) -> tuple[int, int]:
        num_own_pages = len(request.table.pages) - request.table.num_shared
        growth = self.admission.expected_growth(request)
        return growth, num_own_pages * self.memory.page_size

    def _in_use(self) -> int:
        return (self.memory.num_pages - self.memory.num_available) * self.memory.page_size

    def can_start(self, request: Request, num_needed: int) -> bool:
        """Whether `request`, which takes `num_needed` more pages now, should start beside the
        others."""
        growth = self.admission.expected_growth(request)
        used = num_needed * self.memory.page_size
        capacity = self.memory.num_pages * self.memory.page_size
        if self._in_use() + used + self.growth + growth <= capacity:
            return True  # even if all were longest at the same time
        return self.peak((growth, used)) <= capacity

    def add(self, request: Request) -> None:
        """`request` has just started."""
        row = self._row(request)
        self.growth += row[0]
        self.rows.append(row)

    def peak(self, *more: tuple[int, int]) -> int:
        """Most tokens in use at any time, with `more` rows. Each row grows by one token per step
        and is freed when done. So just before the k-th longest row ends, the k longest hold what
        they use now, and each has grown by the growth of the k-th."""
        shared = max(0, self._in_use() - sum(used for _, used in self.rows))
        peak = total = 0
        for count, (growth, used) in enumerate(sorted([*self.rows, *more], reverse=True), 1):
            total += used
            peak = max(peak, total + count * growth)
        return shared + peak


def choose_victim(running: Sequence[Request]) -> Request:
    """The request that gives up its pages when none is left. `running` (not empty) is sorted by
    age. One that only waits for its last results loses nothing. Otherwise it is the youngest of the
    lowest priority: so the oldest always goes on, and all others get their turn."""
    for request in running:
        if request.state is RequestState.LAST:
            return request
    return running[-1]
