"""The queue of a server with API keys: users get equal shares of the tokens that are computed.

Each user (`Request.tenant`) has a queue of its own, and a count of the tokens that were computed
for it, prompts when they start and outputs when they come. Within a priority, the user with the
lowest count is next. A user who was away does not save up a claim: its count is lifted to the
lowest count among those who wait. This is the virtual token counter of Sheng et al., "Fairness in
Serving Large Language Models" (2024). No user starves: while one waits, each start of another
raises the count of the other, and equal counts go by arrival.
"""

import heapq
from collections.abc import Iterable, Iterator

from .admission import WaitingQueue
from .request import Request, RequestState

_SPARE = 256  # so many entries may be out of date before a clean-up


class FairQueue:
    """Requests without a row. Used as a `WaitingQueue` is."""

    def __init__(self) -> None:
        self._queues: dict[str, WaitingQueue] = {}  # of users who have requests in it
        self._counts: dict[str, int] = {}  # tokens computed, by user
        self._floor = 0  # the count with which a user begins; never falls
        self._last = ""  # the user who was the last in the queue
        self._started: dict[Request, int] = {}  # left the queue -> tokens of it that were counted
        self._most_started = _SPARE

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of the requests in the queue."""
        return sum(queue.num_tokens for queue in self._queues.values())

    def share_of(self, tenant: str) -> tuple[int, int]:
        """Requests of a user in the queue, and their prompt tokens."""
        queue = self._queues.get(tenant)
        return (0, 0) if queue is None else queue.share_of(tenant)

    def first(self, count: int) -> Iterable[Request]:
        """Up to `count` requests, in the order in which they should start. Those that it yields
        may be removed meanwhile."""
        if len(self._queues) > 1:
            return self._in_turn(count)
        return [request for queue in self._queues.values() for request in queue.first(count)]

    def _in_turn(self, count: int) -> Iterator[Request]:
        self._count_tokens()
        heap = []
        for tenant, queue in self._queues.items():
            requests = iter(queue.first(count))
            request = next(requests)
            tokens = self._counts[tenant]
            heap.append((_turn(request, tokens), tokens, requests, request))
        heapq.heapify(heap)
        while heap and count > 0:
            _, tokens, requests, request = heapq.heappop(heap)
            tokens += len(request.tokens)  # as if it started
            follower = next(requests, None)
            if follower is not None:
                heapq.heappush(heap, (_turn(follower, tokens), tokens, requests, follower))
            yield request
            count -= 1

    def push(self, request: Request) -> None:
        """Insert a request."""
        tenant = request.tenant
        if tenant not in self._queues:
            self._lift(tenant)
            self._queues[tenant] = WaitingQueue()
        self._queues[tenant].push(request)

    def remove(self, request: Request) -> None:
        """Take a request out, because it starts or ends."""
        queue = self._queues[request.tenant]
        queue.remove(request)
        self._started.setdefault(request, 0)
        if len(self._started) > self._most_started:
            self._count_tokens()
            self._most_started = 2 * len(self._started) + _SPARE
        if not len(queue):
            del self._queues[request.tenant]
            self._last = request.tenant

    def expired(self, now_ns: int) -> list[Request]:
        """Requests whose wait is over. They stay in the queue until they are removed."""
        return [r for queue in self._queues.values() for r in queue.expired(now_ns)]

    def _lift(self, tenant: str) -> None:
        """A user comes (back) to the queue."""
        self._count_tokens()
        waiting = [self._counts[other] for other in self._queues]
        lowest = min(waiting, default=self._counts.get(self._last, 0))
        self._floor = max(self._floor, lowest)
        if len(self._counts) > 2 * len(self._queues) + _SPARE:
            # A count below the floor says no more than a missing one.
            self._counts = {
                name: count
                for name, count in self._counts.items()
                if count > self._floor or name in self._queues
            }
        self._counts[tenant] = max(self._counts.get(tenant, 0), self._floor)

    def _count_tokens(self) -> None:
        """Count the tokens since the last call, of requests that left the queue."""
        for request, num_counted in list(self._started.items()):
            if request.queue_ns >= 0 and request.tenant in self._counts:  # it did start
                self._counts[request.tenant] += len(request.tokens) - num_counted
                self._started[request] = len(request.tokens)
            if request.state is RequestState.FINISHED:
                del self._started[request]

    def check_integrity(self) -> list[Request]:
        """All requests. Raise AssertionError if an order or a count is wrong."""
        requests = []
        for tenant, queue in self._queues.items():
            own = queue.check_integrity()
            assert own, "an empty queue was kept"
            assert all(request.tenant == tenant for request in own), "in another user's queue"
            assert tenant in self._counts, "a user without a count"
            requests += own
        return requests


def _turn(request: Request, num_tokens: int) -> tuple[int, bool, int, int]:
    """Order among the first requests of all users, `num_tokens` being the count of its user. Those
    that already ran come first, in order of arrival, as in any queue."""
    priority, is_new, arrival = request.queue_key
    return (priority, is_new, num_tokens if is_new else 0, arrival)
