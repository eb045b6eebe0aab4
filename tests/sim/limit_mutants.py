"""Faults made by hand in what limits requests: the queue, the order of starts, shares, aborts."""

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from glimmer.scheduler import admission, core, fairness, memory

Patch = Callable[[Any, str, Any], None]
Mutant = Callable[[Patch], None]


def edit(owner: Any, name: str, old: str, new: str) -> Mutant:
    """The mutant in which the source of `owner.name` says `new` instead of `old`."""
    function = owner.__dict__[name]
    function = getattr(function, "func", None) or getattr(function, "fget", None) or function
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} says {source.count(old)} times {old!r}"
    scope = sys.modules[function.__module__].__dict__

    def mutant(patch: Patch) -> None:
        made: dict[str, Any] = {}
        exec(source.replace(old, new), scope, made)
        patch(owner, name, made[name])

    return mutant


def constant(module: Any, name: str, value: Any) -> Mutant:
    """The mutant in which a constant is another one."""
    return lambda patch: patch(module, name, value)


_last_victim: list[int] = [0]


def _same_victim(running: Any) -> Any:
    again = [r for r in running if r.request_id == _last_victim[0]]
    victim = (again or running)[-1]
    _last_victim[0] = victim.request_id
    return victim


_refuse = admission.Admission, "refuse"
_shares = admission.Admission, "_exceeds_share"
_start = core.Scheduler, "_start_waiting"

LIMIT_MUTANTS: dict[str, Mutant] = {
    "lets any number of requests overtake": constant(core, "_MAX_OVERTAKEN", 1 << 30),
    "starts requests without a look at those that run": edit(
        admission.Forecast, "can_start", "self._in_use() + used + self.growth + growth", "used"
    ),
    "expects no growth of those that run": edit(
        admission.Forecast, "_row", "return growth,", "return 0,"
    ),
    "forgets those that start in the same step": edit(
        admission.Forecast, "add", "self.rows.append(row)", "self.growth -= row[0]"
    ),
    "accepts one request more than the queue holds": edit(
        *_refuse, "num_waiting >=", "num_waiting >"
    ),
    "refuses the last request that the queue holds": edit(
        *_refuse, "num_waiting >=", "num_waiting + 1 >="
    ),
    "ignores the limit of waiting requests": edit(
        *_refuse, "num_waiting >=", "num_waiting - 2e9 >="
    ),
    "ignores the limit of waiting tokens": edit(
        *_refuse, "and num_tokens >", "and num_tokens - 2e9 >"
    ),
    "does not count the prompt that comes": edit(
        *_refuse, "waiting.num_tokens + request.num_prompt_tokens", "waiting.num_tokens"
    ),
    "ignores how many requests of a user wait": edit(
        *_shares, "if num_own >=", "if num_own - 2e9 >="
    ),
    "ignores how many tokens of a user wait": edit(*_shares, "if num_own and", "if 0 and"),
    "takes the whole queue for that of a user": edit(
        fairness.FairQueue, "share_of", "queue.share_of(tenant)", "(len(self), self.num_tokens)"
    ),
    "serves users in order of arrival": edit(fairness, "_turn", "if is_new else 0", "* 0"),
    "serves one user until nobody of it waits": edit(
        fairness, "_turn", "num_tokens if is_new else 0", "-num_tokens"
    ),
    "lets a user save up a claim": edit(
        fairness.FairQueue,
        "_lift",
        "self._counts[tenant] = max(self._counts.get(tenant, 0), self._floor)",
        "self._counts.setdefault(tenant, 0)",
    ),
    "does not count the outputs of a user": edit(
        fairness.FairQueue,
        "_count_tokens",
        "len(request.tokens) - num_counted",
        "request.num_prompt_tokens * (not num_counted)",
    ),
    "obeys an abort in the queue only": edit(
        core.Scheduler, "_handle", "is not None:", "is not None and request.row < 0:"
    ),
    "keeps a page at a flush": edit(
        memory.Memory, "flush", "self.cache.num_evictable)", "self.cache.num_evictable - 1)"
    ),
    "preempts one request too many": edit(
        core.Scheduler, "_preempt", "while len(needy) >", "while needy and len(needy) >="
    ),
    "preempts the same request for ever": constant(core, "choose_victim", _same_victim),
    "starts the queue from its end": edit(
        *_start, "self._waiting.first(_SCAN)", "reversed(list(self._waiting.first(_SCAN)))"
    ),
}
