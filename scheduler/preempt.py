"""Whose pages are taken when none is left.

The order is total (priority, then arrival) and the front of it is never a victim of those behind,
so the oldest request always gets on and every other one gets its turn: no livelock.
"""

from collections.abc import Sequence

from .request import Request, RequestState


def choose_victim(running: Sequence[Request]) -> Request:
    """The request that gives up its pages; `running` (not empty) is sorted by age. One that only
    waits for its last results loses nothing by it; else the youngest of the lowest priority."""
    for request in running:
        if request.state is RequestState.LAST:
            return request
    return running[-1]
