"""Which grammars the worker group has, so that a row is admitted only when its grammar is there.

Loading one takes the worker a while, beside its steps; until it says that it is done the requests
that need it are passed over, and nobody else waits. Grammars without requests are kept for the
next ones, up to a number.
"""

from collections import Counter, OrderedDict

from ..shared.messages import Grammar, GrammarLoaded, LoadGrammar
from .request import Request

MAX_IDLE = 32  # grammars kept that no live request has


class Grammars:
    """The grammars of all live requests, by name, and those that the workers of `epoch` hold.
    What is to be sent to rank 0 collects in `outbox`."""

    def __init__(self) -> None:
        self.outbox: list[LoadGrammar] = []
        self._epoch = -1  # -1: there are no workers
        self._users: Counter[str] = Counter()  # live requests
        self._known: dict[str, Grammar] = {}  # of live requests
        self._loaded: dict[str, bool] = {}  # asked for: whether it is there
        self._idle: OrderedDict[str, None] = OrderedDict()  # loaded, without users, oldest first

    def start(self, epoch: int) -> None:
        """New workers, which have nothing: ask for all that live requests need."""
        self.forget()
        self._epoch = epoch
        for grammar in self._known.values():
            self._ask(grammar)

    def forget(self) -> None:
        """The workers are gone."""
        self._epoch = -1
        self._loaded.clear()
        self._idle.clear()
        self.outbox.clear()

    def add(self, request: Request) -> None:
        """A request lives now."""
        grammar = request.grammar
        if grammar is None:
            return
        self._users[grammar.name] += 1
        self._known.setdefault(grammar.name, grammar)
        self._idle.pop(grammar.name, None)
        if self._epoch >= 0 and grammar.name not in self._loaded:
            self._ask(grammar)

    def remove(self, request: Request) -> None:
        """The request has ended; its row, if it had one, is free."""
        grammar = request.grammar
        if grammar is None:
            return
        self._users[grammar.name] -= 1
        if self._users[grammar.name]:
            return
        del self._users[grammar.name], self._known[grammar.name]
        if self._loaded.get(grammar.name):
            self._retire(grammar.name)

    def on_loaded(self, message: GrammarLoaded) -> bool:
        """Rank 0 answered. False if nobody asked it."""
        name = message.name
        if message.epoch != self._epoch or self._loaded.get(name) is not False:
            return False
        if message.error:
            del self._loaded[name]  # the next request with it asks again
        else:
            self._loaded[name] = True
            if not self._users[name]:
                self._retire(name)
        return True

    def is_missing(self, request: Request) -> bool:
        """Whether the request has to wait for its grammar."""
        return request.grammar is not None and not self._loaded.get(request.grammar.name)

    def _ask(self, grammar: Grammar) -> None:
        self._loaded[grammar.name] = False
        self.outbox.append(LoadGrammar(self._epoch, grammar))

    def _retire(self, name: str) -> None:
        self._idle[name] = None
        if len(self._idle) > MAX_IDLE:
            oldest, _ = self._idle.popitem(last=False)
            del self._loaded[oldest]
            self.outbox.append(LoadGrammar(self._epoch, None, [oldest]))

    def check_integrity(self, live: list[Request]) -> None:
        """Raise AssertionError unless exactly the `live` requests are counted."""
        counted = Counter(r.grammar.name for r in live if r.grammar is not None)
        assert counted == self._users, "users of grammars"
        assert self._known.keys() == counted.keys(), "known grammars"
        idle = {name for name, there in self._loaded.items() if there and not counted[name]}
        assert idle == self._idle.keys(), "idle grammars"
        assert len(self._idle) <= MAX_IDLE, "too many idle grammars"
