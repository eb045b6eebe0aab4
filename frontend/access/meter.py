"""How much of the server one user uses, and the refusal (429) of what goes beyond the limits.

Tokens per minute are a balance, which grows steadily up to the tokens of one minute. A request is
accepted while the balance is positive; its prompt and outputs are then taken from it, so it may
become negative. No request is too large to be accepted, and in the long run the limit is kept.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from ...shared.errors import KeyLimitError
from ..context import RequestContext
from ..wire.connection import Budget
from .keys import Limits
from .shared_usage import SharedUsage, Usage

_RETRY_S = 1.0  # when an open request may end at any time


class Charge:
    """An open request and the tokens that it has used so far."""

    def __init__(self, meter: "Meter", context: RequestContext) -> None:
        self._meter = meter
        self._context = context
        self._num_paid = 0  # outputs that were taken from the balance
        self.prompt_tokens = 0

    @property
    def num_queued(self) -> int:
        """Prompt tokens that wait for their first output."""
        job = self._context.job
        has_started = job is not None and job.first_token_s is not None
        return 0 if has_started else self.prompt_tokens

    def unpaid_outputs(self) -> int:
        """Output tokens since the last call."""
        job = self._context.job
        num_outputs = 0 if job is None else job.usage().output_tokens
        num_new, self._num_paid = num_outputs - self._num_paid, num_outputs
        return num_new

    def take_prompts(self, prompts: list[list[int]]) -> None:
        """The request is about to be submitted. Raises KeyLimitError if it must not be."""
        num_tokens = sum(map(len, prompts))
        self.prompt_tokens += num_tokens
        try:
            self._meter.check_tokens(num_tokens)
        except KeyLimitError:
            self.prompt_tokens -= num_tokens
            raise
        self._meter.use(num_tokens)
        self._meter.settle()


class Meter:
    """Usage of one user. `shared` adds what it uses of other HTTP processes. `budget` counts the
    bytes that are held for it."""

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        shared: SharedUsage | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.limits = limits
        self.budget = budget or Budget(sys.maxsize)
        self.balance = float(limits.tokens_per_minute or 0)  # tokens that may still be used
        self.open: list[Charge] = []
        self._clock = clock
        self._settled_at = clock()
        self._shared = shared
        self._used_tokens = 0 if shared is None else shared.own.used_tokens
        self._others = Usage() if shared is None else shared.others()

    @contextlib.contextmanager
    def admitted(self, context: RequestContext) -> Iterator[None]:
        """Counts a request until it ends. Raises KeyLimitError if it must not begin."""
        context.charge = Charge(self, context)
        self.open.append(context.charge)
        try:
            self.check(num_own=1)
            yield
        finally:
            self.settle()
            self.open.remove(context.charge)
            self._follow()

    @property
    def _num_open(self) -> int:
        return len(self.open) + self._others.requests

    def check(self, num_own: int = 0) -> None:
        """Raise KeyLimitError if another request must not begin. `num_own`: 1 if it is among the
        open ones already."""
        self.check_tokens(0)
        limit, num_open = self.limits.requests, self._num_open - num_own
        if limit is not None and num_open >= limit:
            raise KeyLimitError(
                f"{num_open} requests of this key are open, its limit", None, _RETRY_S
            )

    def check_tokens(self, num_new: int) -> None:
        """Raise KeyLimitError if no more tokens may be used now, or if `num_new` of those that
        wait must not wait beside the others. One request alone may always wait."""
        self.settle()
        per_minute, most_queued = self.limits.tokens_per_minute, self.limits.queued_tokens
        if per_minute is not None and self.balance <= 0:
            wait_s = (1 - self.balance) * 60 / per_minute
            message = f"this key has used its {per_minute} tokens per minute"
            raise KeyLimitError(message, None, wait_s)
        num_queued = self._num_queued + self._others.queued_tokens - num_new
        if most_queued is not None and num_queued and num_queued + num_new > most_queued:
            message = f"{num_queued} prompt tokens of this key are waiting, its limit {most_queued}"
            raise KeyLimitError(message, None, _RETRY_S)

    def settle(self) -> None:
        """Bring the balance up to date, also with other processes. They expect it every second, if
        there are any."""
        now = self._clock()
        per_minute = self.limits.tokens_per_minute or 0
        earned = (now - self._settled_at) * per_minute / 60
        self.balance = min(per_minute, self.balance + earned)
        self._settled_at = now
        self.use(sum(charge.unpaid_outputs() for charge in self.open))
        self._follow()

    def use(self, num_tokens: int) -> None:
        """Take tokens from the balance."""
        self.balance -= num_tokens
        self._used_tokens += num_tokens

    @property
    def _num_queued(self) -> int:
        return sum(charge.num_queued for charge in self.open)

    def _follow(self) -> None:
        """Tell the other processes what is used here, and take their tokens from the balance."""
        if self._shared is not None:
            self._shared.publish(Usage(len(self.open), self._num_queued, self._used_tokens))
            others = self._shared.others()
            self.balance -= others.used_tokens - self._others.used_tokens
            self._others = others

    def change_limits(self, limits: Limits) -> None:
        """The key file has changed. A new limit of tokens begins with a whole minute's."""
        self.settle()
        if self.limits.tokens_per_minute is None:
            self.balance = float(limits.tokens_per_minute or 0)
        self.limits = limits

    def headers(self) -> dict[str, str]:
        """The rest of the limits, as OpenAI's headers say it. Requests are those open at the same
        time."""
        self.settle()
        headers = {}
        if self.limits.requests is not None:
            headers["x-ratelimit-limit-requests"] = str(self.limits.requests)
            left = self.limits.requests - self._num_open
            headers["x-ratelimit-remaining-requests"] = str(max(0, left))
        per_minute = self.limits.tokens_per_minute
        if per_minute is not None:
            headers["x-ratelimit-limit-tokens"] = str(per_minute)
            headers["x-ratelimit-remaining-tokens"] = str(max(0, int(self.balance)))
            reset_s = (per_minute - self.balance) * 60 / per_minute
            headers["x-ratelimit-reset-tokens"] = f"{reset_s:.3f}s"
        return headers
