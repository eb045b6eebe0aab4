"""Which grammars the worker group has loaded, so that a row is admitted only after its grammar.

Rank 0 takes a while to load a grammar, beside its steps. Requests that need the grammar wait until
it is loaded; other requests do not. Some grammars without requests are kept for later ones.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable

from ..shared.config import ServeConfig
from ..shared.messages import Grammar, GrammarLoaded, LoadGrammar

MAX_IDLE = 32  # grammars that are kept although no live request needs them


class Grammars:
    """The grammars of all live requests, by name, and those that the workers of `epoch` have.
    Messages for rank 0 collect in `outbox`."""

    def __init__(self, config: ServeConfig) -> None:
        self._timeout_ns = config.step_timeout_s * 1e9
        self.outbox: list[LoadGrammar] = []
        self._epoch = -1  # -1: there are no workers
        self._users: Counter[str] = Counter()  # live requests
        self._known: dict[str, Grammar] = {}  # of live requests
        self.loading: dict[str, None] = {}  # asked for, in the order in which rank 0 loads them
        self._progress_ns = 0  # when rank 0 began with the first of these
        self._loaded: set[str] = set()
        self._idle: OrderedDict[str, None] = OrderedDict()  # loaded, without users, oldest first

    def start(self, epoch: int, now_ns: int) -> None:
        """New workers are ready and have no grammar: ask for those of live requests."""
        self.forget()
        self._epoch = epoch
        for grammar in self._known.values():
            self._ask(grammar, now_ns)

    def forget(self) -> None:
        """The workers are gone."""
        self._epoch = -1
        self.loading.clear()
        self._loaded.clear()
        self._idle.clear()
        self.outbox.clear()

    def add(self, grammar: Grammar, now_ns: int) -> None:
        """A request with this grammar was accepted."""
        self._users[grammar.name] += 1
        self._known.setdefault(grammar.name, grammar)
        self._idle.pop(grammar.name, None)
        was_asked_for = grammar.name in self._loaded or grammar.name in self.loading
        if self._epoch >= 0 and not was_asked_for:
            self._ask(grammar, now_ns)

    def remove(self, grammar: Grammar) -> None:
        """A request with this grammar has ended; its row, if it had one, is free."""
        self._users[grammar.name] -= 1
        if self._users[grammar.name]:
            return
        del self._users[grammar.name], self._known[grammar.name]
        if grammar.name in self._loaded:
            self._retire(grammar.name)

    def on_loaded(self, message: GrammarLoaded, now_ns: int) -> bool:
        """Rank 0 answered. False if it was not asked."""
        name = message.name
        if message.epoch != self._epoch or name not in self.loading:
            return False
        del self.loading[name]
        self._progress_ns = now_ns
        if not message.error:  # after an error, the next request with this grammar asks again
            self._loaded.add(name)
            if not self._users[name]:
                self._retire(name)
        return True

    def is_missing(self, grammar: Grammar) -> bool:
        """Whether the workers do not have this grammar yet."""
        return grammar.name not in self._loaded

    def is_next(self, grammar: Grammar | None) -> bool:
        """Whether rank 0 is loading this grammar at the moment."""
        return grammar is not None and next(iter(self.loading), None) == grammar.name

    def is_overdue(self, now_ns: int) -> bool:
        """Whether rank 0 has been loading one grammar for longer than `step_timeout_s`."""
        return bool(self.loading) and now_ns - self._progress_ns > self._timeout_ns

    def _ask(self, grammar: Grammar, now_ns: int) -> None:
        if not self.loading:
            self._progress_ns = now_ns
        self.loading[grammar.name] = None
        self.outbox.append(LoadGrammar(self._epoch, grammar))

    def _retire(self, name: str) -> None:
        self._idle[name] = None
        if len(self._idle) > MAX_IDLE:
            oldest, _ = self._idle.popitem(last=False)
            self._loaded.remove(oldest)
            self.outbox.append(LoadGrammar(self._epoch, None, [oldest]))

    def check_integrity(self, live: Iterable[Grammar | None]) -> None:
        """Raise AssertionError unless exactly the grammars of all live requests are counted."""
        users = Counter(grammar.name for grammar in live if grammar is not None)
        assert users == self._users, "users of grammars"
        assert self._known.keys() == users.keys(), "known grammars"
        idle = {name for name in self._loaded if not users[name]}
        assert idle == self._idle.keys(), "idle grammars"
        assert len(self._idle) <= MAX_IDLE, "too many idle grammars"
