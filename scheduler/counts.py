"""The heartbeat: what the core counts since its start, and how things stand at this moment."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..shared.messages import Heartbeat
from .peers import WorkerGroup
from .request import Request, RequestState


@dataclasses.dataclass(slots=True)
class Counts:
    """Cumulative; the names are those of the heartbeat's fields."""

    steps: int = 0  # results received
    malformed_messages: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    generated_tokens: int = 0

    def heartbeat(
        self, workers: WorkerGroup, requests: Iterable[Request], malformed: int, **others: Any
    ) -> Heartbeat:
        """Of all live `requests`. `malformed` messages come on top of those counted here, and
        `others` are the other fields."""
        states = Counter(r.state if r.row < 0 else None for r in requests)  # None: running
        memory = workers.memory
        counts = dataclasses.asdict(self)
        counts["malformed_messages"] += malformed
        return Heartbeat(
            num_running=states[None],
            num_waiting=states[RequestState.WAITING],
            num_paused=states[RequestState.PAUSED],
            pages_total=memory.num_pages,
            pages_free=memory.pool.num_free,
            pages_cached=memory.cache.num_evictable,
            worker_ready=workers.ready and not workers.failed,
            **counts,
            **others,
        )
