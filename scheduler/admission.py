"""Who may enter the queue, and who may start: limits, typed refusals, optimistic admission.

Requests start as long as the *expected* peak of KV use fits: expected by the lengths of recently
finished outputs, not by `max_new_tokens`, which clients often set huge. When the guess is wrong,
preemption is the safety net (`preempt.py`).
"""

import math
import sys
from functools import cached_property
from typing import NamedTuple

from ..shared.config import ServeConfig
from ..shared.errors import ConfigError
from ..shared.messages import Submit
from .memory import Memory
from .request import Request

_FIRST_GUESS = 2048  # expected output tokens before anything has finished, or
_FIRST_SHARE = 1 / 16  # this share of all KV tokens if that is less
_LEARNING_RATE = 0.05
_MAX_RETRY_S = 60.0
_MAX_INTERVAL_NS = 10_000_000_000


class StepLimits(NamedTuple):
    """What one step may hold."""

    max_rows: int
    max_tokens: int
    chunk_size: int
    whole_prompts: bool  # chunking is off: a prompt runs in one step or waits

    @classmethod
    def of(cls, config: ServeConfig) -> "StepLimits":
        """From a settled configuration. Raises ConfigError if it is not settled or not positive."""
        values = (
            config.running_max_req_size,
            config.batch_max_tokens,
            config.chunked_prefill_size or config.batch_max_tokens,
        )
        if any(value is None or value < 1 for value in values) or config.page_size < 1:
            raise ConfigError(
                "running_max_req_size, batch_max_tokens, chunked_prefill_size and page_size "
                f"must be positive, got {values} and {config.page_size}"
            )
        rows, tokens, chunk = (value or 0 for value in values)
        return cls(rows, tokens, chunk, config.disable_chunked_prefill)


class Ending(NamedTuple):
    """Why a request ends: the fields of `Finished` that say so."""

    reason: str
    message: str = ""
    field: str = ""
    retry_after_s: float = 0.0


class Admission:
    """Limits of the queue and of one request, and what was learned about lengths and speed."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._expected_output = float(_FIRST_GUESS)
        self._num_outputs = 0  # learned from so far
        self._last_start_ns: int | None = None  # None: nobody was waiting after the last start
        self._start_interval_ns = 1e9  # moving average of the time between two starts
        self.draining = False
        self.max_req_total_len = config.max_req_total_len or sys.maxsize

    # --- limits --------------------------------------------------------------------------

    def settle_limit(self, num_pages: int) -> None:
        """The workers hold `num_pages`: any one request must fit with a page to spare, and
        without chunking its whole prompt (and, resumed, its outputs) must fit one step."""
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
        """Settle the request's longest total length; an Ending if it can never run."""
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

    def refuse(self, request: Request, num_waiting: int, waiting_tokens: int) -> Ending | None:
        """An Ending for a new request that must not enter the queue."""
        if self.draining:
            return Ending("overloaded", "the server is shutting down", retry_after_s=1.0)
        ending = self.fit_length(request)
        if ending is not None:
            return ending
        config = self._config
        if num_waiting >= config.max_queued_requests:
            return self._overloaded(f"{num_waiting} requests are waiting", num_waiting)
        tokens = waiting_tokens + request.num_prompt_tokens
        if num_waiting and tokens > config.max_queued_tokens:
            return self._overloaded(f"{waiting_tokens} prompt tokens are waiting", num_waiting)
        return None

    def timed_out(self, num_waiting: int) -> Ending:
        """The Ending of a request that waited too long."""
        return self._overloaded("no capacity became free in time", num_waiting)

    def _overloaded(self, message: str, num_waiting: int) -> Ending:
        wait_s = math.ceil(num_waiting * self._start_interval_ns / 1e9)
        return Ending("overloaded", message, retry_after_s=min(max(1.0, wait_s), _MAX_RETRY_S))

    def uses_cache(self, submit: Submit) -> bool:
        """Whether the prefix cache serves it. Log-probabilities of a prompt need all of it run."""
        is_on = not self._config.disable_dynamic_prompt_cache
        return is_on and submit.use_prefix_cache and submit.sampling.num_prompt_logprobs < 0

    def queue_timeout_ns(self, timeout_s: float) -> int:
        """How long a request may wait, by its own wish or the server's default; 0: no limit."""
        return int((timeout_s if timeout_s > 0 else self._config.queue_timeout_s) * 1e9)

    # --- learning ------------------------------------------------------------------------

    def observe_start(self, now_ns: int, num_waiting: int) -> None:
        """A request left the queue, `num_waiting` stayed: learn how fast the queue drains."""
        if self._last_start_ns is not None:
            interval = min(now_ns - self._last_start_ns, _MAX_INTERVAL_NS)
            self._start_interval_ns += _LEARNING_RATE * (interval - self._start_interval_ns)
        self._last_start_ns = now_ns if num_waiting else None

    def observe_output(self, num_tokens: int) -> None:
        """A request ended by itself: learn how long outputs are."""
        self._num_outputs += 1
        rate = max(_LEARNING_RATE, 1 / (self._num_outputs + 1))
        self._expected_output += rate * (num_tokens - self._expected_output)

    # --- optimistic admission ------------------------------------------------------------

    def expected_growth(self, request: Request) -> int:
        """Expected tokens still to come; at least a page, so that a row that just started is not
        preempted at once."""
        produced = request.num_output_tokens
        longest = request.max_total_tokens - len(request.tokens)
        guess = max(self._expected_output - produced, produced / 8, self._config.page_size)
        return min(longest, int(guess))

    def forecast(self, memory: Memory, running: list[Request]) -> "Forecast":
        """Expected KV use of `running`, to ask `can_start` about several requests in one step."""
        return Forecast(self, memory, running)

    def can_start(self, forecast: "Forecast", request: Request, num_needed: int) -> bool:
        """Whether `request`, which takes `num_needed` more pages now, should start beside those
        of the forecast. Alone it always may."""
        memory = forecast.memory
        if num_needed > memory.num_available:
            return False
        if not forecast.rows:
            return True
        growth, used = self.expected_growth(request), num_needed * memory.page_size
        capacity = memory.num_pages * memory.page_size
        if forecast.in_use + used + forecast.growth + growth <= capacity:
            return True  # even if all were longest at the same time
        return forecast.peak((growth, used)) <= capacity


class Forecast:
    """What running requests are expected to hold. Rows are looked at once, when first asked for;
    `add` keeps up with requests that start in the same step."""

    def __init__(self, admission: Admission, memory: Memory, running: list[Request]) -> None:
        self.memory = memory
        self._admission = admission
        self._running = running

    @cached_property
    def rows(self) -> list[tuple[int, int]]:
        """(expected growth, tokens of pages not shared) of each request."""
        return [self._row(request) for request in self._running]

    @cached_property
    def growth(self) -> int:
        """Tokens that all of them are expected to grow by."""
        return sum(growth for growth, _ in self.rows)

    @property
    def in_use(self) -> int:
        """Tokens of the pages held now."""
        return (self.memory.num_pages - self.memory.num_available) * self.memory.page_size

    def add(self, request: Request) -> None:
        """`request` has just started."""
        row = self._row(request)
        self.growth += row[0]
        self.rows.append(row)

    def peak(self, *more: tuple[int, int]) -> int:
        """Most tokens in use at any time, with rows `more`, when each row grows by one token per
        step and is freed when done: just before the k-th longest row ends, the k longest hold
        what they use now plus its growth each."""
        shared = max(0, self.in_use - sum(used for _, used in self.rows))
        peak = total = 0
        for count, (growth, used) in enumerate(sorted([*self.rows, *more], reverse=True), 1):
            total += used
            peak = max(peak, total + count * growth)
        return shared + peak

    def _row(self, request: Request) -> tuple[int, int]:
        num_own = len(request.pages) - request.num_shared_pages
        return self._admission.expected_growth(request), num_own * self.memory.page_size
