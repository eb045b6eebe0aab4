"""Which grammars the worker group has, so that a row is admitted only when its grammar is there.

Loading one takes the worker a while, beside its steps; until it says that it is done the requests
that need it are passed over, and nobody else waits. Grammars without requests are kept for the
next ones, up to a number.
"""

from collections import Counter, OrderedDict

from ..shared.config import ServeConfig
from ..shared.messages import Grammar, GrammarLoaded, LoadGrammar
from .request import Request

MAX_IDLE = 32  # grammars kept that no live request has


class Grammars:
    """The grammars of all live requests, by name, and those that the workers of `epoch` hold.
    What is to be sent to rank 0 collects in `outbox`."""

    def __init__(self, config: ServeConfig) -> None:
        self._timeout_ns = config.step_timeout_s * 1e9
        self.outbox: list[LoadGrammar] = []
        self._epoch = -1  # -1: there are no workers
        self._users: Counter[str] = Counter()  # live requests
        self._known: dict[str, Grammar] = {}  # of live requests
        self._loading: dict[str, None] = {}  # asked for, in this order, which is the workers', too
        self._progress_ns = 0  # since when the first of these is what rank 0 works on
        self._loaded: set[str] = set()
        self._idle: OrderedDict[str, None] = OrderedDict()  # loaded, without users, oldest first

    def start(self, epoch: int, now_ns: int) -> None:
        """New workers, which have nothing: ask for all that live requests need."""
        self.forget()
        self._epoch = epoch
        for grammar in self._known.values():
            self._ask(grammar, now_ns)

    def forget(self) -> None:
        """The workers are gone."""
        self._epoch = -1
        self._loading.clear()
        self._loaded.clear()
        self._idle.clear()
        self.outbox.clear()

    def add(self, request: Request, now_ns: int) -> None:
        """A request lives now."""
        grammar = request.grammar
        if grammar is None:
            return
        self._users[grammar.name] += 1
        self._known.setdefault(grammar.name, grammar)
        self._idle.pop(grammar.name, None)
        asked = grammar.name in self._loaded or grammar.name in self._loading
        if self._epoch >= 0 and not asked:
            self._ask(grammar, now_ns)

    def remove(self, request: Request) -> None:
        """The request has ended; its row, if it had one, is free."""
        grammar = request.grammar
        if grammar is None:
            return
        self._users[grammar.name] -= 1
        if self._users[grammar.name]:
            return
        del self._users[grammar.name], self._known[grammar.name]
        if grammar.name in self._loaded:
            self._retire(grammar.name)

    def on_loaded(self, message: GrammarLoaded, now_ns: int) -> bool:
        """Rank 0 answered. False if nobody asked it."""
        name = message.name
        if message.epoch != self._epoch or name not in self._loading:
            return False
        del self._loading[name]
        self._progress_ns = now_ns
        if not message.error:  # else the next request with it asks again
            self._loaded.add(name)
            if not self._users[name]:
                self._retire(name)
        return True

    def is_missing(self, request: Request) -> bool:
        """Whether the request has to wait for its grammar."""
        return request.grammar is not None and request.grammar.name not in self._loaded

    def is_next(self, request: Request) -> bool:
        """Whether rank 0 is loading just this request's grammar."""
        name = next(iter(self._loading), None)
        return request.grammar is not None and request.grammar.name == name

    def is_overdue(self, now_ns: int) -> bool:
        """Whether rank 0 has been loading one grammar for longer than `step_timeout_s`."""
        return bool(self._loading) and now_ns - self._progress_ns > self._timeout_ns

    def _ask(self, grammar: Grammar, now_ns: int) -> None:
        if not self._loading:
            self._progress_ns = now_ns
        self._loading[grammar.name] = None
        self.outbox.append(LoadGrammar(self._epoch, grammar))

    def _retire(self, name: str) -> None:
        self._idle[name] = None
        if len(self._idle) > MAX_IDLE:
            oldest, _ = self._idle.popitem(last=False)
            self._loaded.remove(oldest)
            self.outbox.append(LoadGrammar(self._epoch, None, [oldest]))

    def check_integrity(self, live: list[Request]) -> None:
        """Raise AssertionError unless exactly the `live` requests are counted."""
        counted = Counter(r.grammar.name for r in live if r.grammar is not None)
        assert counted == self._users, "users of grammars"
        assert self._known.keys() == counted.keys(), "known grammars"
        idle = {name for name in self._loaded if not counted[name]}
        assert idle == self._idle.keys(), "idle grammars"
        assert len(self._idle) <= MAX_IDLE, "too many idle grammars"
