"""State that handlers share: `Frontend` exists once per process, `RequestContext` per request."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ..shared.config import ServeConfig
from ..shared.errors import OverloadedError, RequestError, UnavailableError
from .engine.client import RETRY_AFTER_S, EngineClient
from .engine.metrics import FAILURES, REQUESTS, Metrics
from .engine.params import ModelFacts
from .engine.totals import ServerTotals
from .grammar.checker import GrammarChecker
from .text.tokenizer import Tokenizer
from .wire.connection import Connection, Connections
from .wire.shape import BodyLimits

if TYPE_CHECKING:  # these import this module
    from .access.guard import Access
    from .access.keys import Key
    from .access.meter import Charge
    from .access.tls import Tls
    from .engine.job import Job
    from .engine.traces import Tracer
    from .wire.sse import EventStream


@dataclass
class Frontend:
    """Everything that a handler may need. One per process."""

    config: ServeConfig
    facts: ModelFacts
    tokenizer: Tokenizer
    client: EngineClient
    metrics: Metrics
    grammars: GrammarChecker
    connections: Connections
    body_limits: BodyLimits
    access: "Access | None" = None  # None: there are no API keys
    tls: "Tls | None" = None  # None: plain HTTP
    tracer: "Tracer | None" = None  # None: no traces are sent
    totals: ServerTotals | None = None  # None: no launcher adds up the metrics
    created: int = field(default_factory=lambda: int(time.time()))
    beat_at: float = math.inf  # time.monotonic; when the event loop last ran; inf: not watched
    num_open: int = 0  # generating requests, including those that are still being tokenized

    def check_accepting(self) -> None:
        """Raises UnavailableError unless new requests can be taken."""
        reason = self.client.state.why_not_ready()
        if reason not in ("", "engine restarting"):  # while it restarts, requests wait in the queue
            raise UnavailableError(f"not accepting requests: {reason}", None, RETRY_AFTER_S)

    def __post_init__(self) -> None:
        running = self.config.running_max_req_size or 0
        self.max_open = self.config.max_queued_requests + running

    def has_room(self, num_waiting: int = 0) -> bool:
        """Whether another request may be opened, besides `num_waiting` that have arrived. The
        scheduler has the exact limit, for all HTTP processes together."""
        return self.num_open + num_waiting < self.max_open

    def full(self) -> OverloadedError:
        """The error for a request that has no room."""
        problem = f"{self.max_open} requests are open"
        return OverloadedError(problem, retry_after_s=RETRY_AFTER_S)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a generating request and its failure. A disconnected client is no failure."""
        self.metrics.tally.count(REQUESTS)
        try:
            yield
        except ConnectionError:
            raise
        except Exception:
            self.metrics.tally.count(FAILURES)
            raise

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a generating request. Raises OverloadedError when too many are open."""
        if not self.has_room():
            raise self.full()
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1


@dataclass
class RequestContext:
    """Facts about one HTTP request that the middleware collects."""

    request_id: str
    arrived_s: float  # time.monotonic
    connection: Connection
    num_held: int = 0  # bytes of the connection's budget
    ignored: list[str] = field(default_factory=list)  # fields of the body without effect
    stream: "EventStream | None" = None  # the open event stream, if the reply is one
    job: "Job[Any] | None" = None  # what it generates, if it does
    # With API keys:
    key: "Key | None" = None
    tenant: str = ""  # whose request it is
    salt: str = ""  # goes before the cache salt of the request itself
    hides_cached: bool = False  # cached tokens may be those of others
    charge: "Charge | None" = None  # what it uses of the key's limits, if it generates

    def ignore(self, names: Iterable[str], strictly: bool) -> None:
        """Note fields of the body that have no effect. Raises RequestError with --strict_fields."""
        self.ignored += names
        if strictly and self.ignored:
            name = self.ignored[0]
            raise RequestError(f"{name}: has no effect here (--strict_fields)", field=name)

    def hold(self, num_bytes: int) -> None:
        """Count memory that is held for this request. Raises OverloadedError if it is too much."""
        self.connection.budget.charge(num_bytes)
        self.num_held += num_bytes

    def drop(self) -> None:
        """Give back all that is held."""
        self.connection.budget.release(self.num_held)
        self.num_held = 0


FRONTEND = web.AppKey("frontend", Frontend)
CONTEXT = web.RequestKey("context", RequestContext)


def clean_id(text: str) -> str:
    """A client's id made safe for log lines and headers: printable ASCII, at most 128 long."""
    return "".join(c for c in text[:128] if "!" <= c <= "~")


def clean_names(names: list[str]) -> str:
    """Names from a request as one header: printable ASCII, at most 1,000 long."""
    return ", ".join(filter(None, map(clean_id, sorted(set(names)))))[:1000]
