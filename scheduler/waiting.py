"""The queue: requests without a row, in the order in which they should start."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from operator import attrgetter

from .request import Request

_KEY = attrgetter("queue_key")


class WaitingQueue:
    """Sorted by `Request.queue_key`: priority, then requests that already ran, then arrival."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._next_deadline_ns = 0  # no request's wait ends earlier; 0: none ends at all
        self.num_tokens = 0  # prompt tokens of those in the queue

    def __len__(self) -> int:
        return len(self._requests)

    def first(self, count: int) -> Sequence[Request]:
        """A copy of the first `count` requests."""
        return self._requests[:count]

    def push(self, request: Request) -> None:
        """Put it at its place."""
        insort(self._requests, request, key=_KEY)
        self.num_tokens += request.num_prompt_tokens
        deadline = request.deadline_ns
        if deadline and (not self._next_deadline_ns or deadline < self._next_deadline_ns):
            self._next_deadline_ns = deadline

    def remove(self, request: Request) -> None:
        """Take it out; its state must still be the one it was pushed with."""
        index = bisect_left(self._requests, request.queue_key, key=_KEY)
        assert self._requests[index] is request, "the queue lost its order"
        del self._requests[index]
        self.num_tokens -= request.num_prompt_tokens

    def expired(self, now_ns: int) -> list[Request]:
        """Requests whose wait is over (they stay in the queue until removed)."""
        if not self._next_deadline_ns or now_ns < self._next_deadline_ns:
            return []
        over = [r for r in self._requests if r.deadline_ns and r.deadline_ns <= now_ns]
        later = [r.deadline_ns for r in self._requests if r.deadline_ns > now_ns]
        self._next_deadline_ns = min(later, default=0)
        return over

    def check_integrity(self) -> list[Request]:
        """All requests, in order. Raise AssertionError if order or token count are wrong."""
        keys = [r.queue_key for r in self._requests]
        assert keys == sorted(keys), "the queue is not sorted"
        num_tokens = sum(r.num_prompt_tokens for r in self._requests)
        assert self.num_tokens == num_tokens, "tokens in the queue"
        assert not any(r.row >= 0 or r.pages for r in self._requests), "queued but has a row"
        return self._requests.copy()
