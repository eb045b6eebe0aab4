"""Processes that die: which frontends are alive, and how requests survive the loss of their KV.

KV is lost when the worker group dies, and when a step fails. Requests that ran go back to the head
of the queue with their tokens so far, and are replayed. Equal seeds and positions give equal
tokens, so a stream goes on where it was.
"""

from collections.abc import Iterable

from .admission import Queue
from .request import Ending, Request, RequestState

MAX_WORKER_LOSSES = 2  # a request that ran in so many groups that died may be the cause


def requeue(requests: Iterable[Request], waiting: Queue) -> list[Request]:
    """The KV of all live `requests` is gone, and no result in flight will be read. Put those that
    ran back into the queue, and return them."""
    queued_states = (RequestState.WAITING, RequestState.PAUSED)
    lost: list[Request] = []
    for request in requests:
        request.table.waits_for = None
        request.pages_needed = 0
        is_queued = request.state in queued_states
        if is_queued and not request.results_in_flight:
            continue
        lost.append(request)
        request.table.clear()
        request.row = -1
        request.lose_planned()
        if not is_queued:
            request.move(RequestState.PAUSED)
            waiting.push(request)
    return lost


def blame(requests: Iterable[Request]) -> list[tuple[Request, Ending]]:
    """A worker group died while it worked on `requests`. Returns those that have seen too many
    groups die, and must end."""
    text = f"the workers died {MAX_WORKER_LOSSES} times while working on this request"
    endings: list[tuple[Request, Ending]] = []
    for request in requests:
        request.worker_losses += 1
        if request.worker_losses >= MAX_WORKER_LOSSES:
            endings.append((request, Ending("unavailable", text)))
    return endings


class Frontends:
    """Which incarnation of each frontend is alive. Frontends and launcher use different sockets,
    so a new frontend may be heard before the loss of the old one is reported."""

    def __init__(self) -> None:
        self._pids: dict[int, int] = {}
        self._late_losses: dict[int, int] = {}  # replaced before their PeerLost came

    def greeted(self, index: int, pid: int) -> bool:
        """A frontend said hello. True if it replaces one whose loss was not reported yet."""
        replaces = self._pids.get(index, pid) != pid
        if replaces:
            self._late_losses[index] = self._late_losses.get(index, 0) + 1
        self._pids[index] = pid
        return replaces

    def lost(self, index: int) -> bool:
        """A loss was reported. False if the lost frontend has been replaced already."""
        if self._late_losses.get(index):
            self._late_losses[index] -= 1
            return False
        self._pids.pop(index, None)
        return True
