"""State that handlers share: `Frontend` exists once per process, `RequestContext` per request."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ..shared.config import ServeConfig
from ..shared.errors import OverloadedError, UnavailableError
from .engine.client import RETRY_AFTER_S, EngineClient
from .engine.metrics import Metrics
from .engine.params import ModelFacts
from .grammar.compiler import GrammarCompiler
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:  # these import this module
    from .access.guard import Access
    from .access.keys import Key
    from .access.meter import Charge
    from .engine.job import Job
    from .wire.sse import EventStream, Stalls


@dataclass
class Frontend:
    """Everything that a handler may need. One per process."""

    config: ServeConfig
    facts: ModelFacts
    tokenizer: Tokenizer
    client: EngineClient
    metrics: Metrics
    grammars: GrammarCompiler
    stalls: "Stalls"
    access: "Access | None" = None  # None: there are no API keys
    created: int = field(default_factory=lambda: int(time.time()))
    num_open: int = 0  # generating requests, including those that are still being tokenized
    num_body_bytes: int = 0  # received so far, of bodies that are not complete yet

    def check_accepting(self) -> None:
        """Raises UnavailableError unless new requests can be taken."""
        reason = self.client.state.why_not_ready()
        if (
            reason and reason != "engine restarting"
        ):  # while it restarts, requests wait in the queue
            raise UnavailableError(f"not accepting requests: {reason}", None, RETRY_AFTER_S)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a generating request. Raises OverloadedError when far too many are open. This is
        a safety net: normally clients meet the scheduler's queue limit first."""
        limit = self.config.max_queued_requests + (self.config.running_max_req_size or 0)
        if self.num_open >= limit:
            raise OverloadedError(f"{limit} requests are open", retry_after_s=RETRY_AFTER_S)
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
    stream: "EventStream | None" = None  # the open event stream, if the reply is one
    job: "Job[Any] | None" = None  # what it generates, if it does
    # With API keys:
    key: "Key | None" = None
    tenant: str = ""  # whose request it is
    salt: str = ""  # goes before the cache salt of the request itself
    hides_cached: bool = False  # cached tokens may be those of others
    charge: "Charge | None" = None  # what it uses of the key's limits, if it generates


FRONTEND = web.AppKey("frontend", Frontend)
CONTEXT = web.RequestKey("context", RequestContext)


def clean_id(text: str) -> str:
    """A client's id made safe for log lines and headers: printable ASCII, at most 128 long."""
    return "".join(c for c in text[:128] if "!" <= c <= "~")
