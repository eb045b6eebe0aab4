"""Grammars for this frontend's requests: has them composed and checked by child processes
(`check_child.py`), and keeps the results.

A child gets a `GrammarSource` and answers with an `Answer`. Two of them, so that one slow source
does not stop all others.
"""

import asyncio
import hashlib
import signal
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import msgspec

from ...shared.config import ServeConfig
from ...shared.errors import OverloadedError, RequestError, UnavailableError
from ...shared.messages import Grammar
from ..child import ChildDiedError, KillableChild
from .check_child import Answer, Setup
from .source import GrammarSource

_CHILDREN = 2
_MAX_WAITING = 256  # checks asked for and not answered
_MAX_KEPT = 32 << 20  # bytes of answers
_WALL_FACTOR = 20  # a child gives up by its processor time; this is for one that does not run
_encode = msgspec.json.encode


class GrammarChecker:
    """Sources to grammars. Used on one event loop."""

    def __init__(self, config: ServeConfig, vocab_size: int, added_ids: dict[str, int]) -> None:
        self._config = config
        timeout_s = config.grammar_timeout_s
        setup = _encode(Setup(vocab_size, added_ids, config.grammar_memory_mb, timeout_s))
        module = f"{__package__}.check_child"
        limit_s = 10.0 + _WALL_FACTOR * timeout_s
        self.children = [KillableChild(module, setup, limit_s) for _ in range(_CHILDREN)]
        self._idle = list(self.children)
        self._pool = ThreadPoolExecutor(_CHILDREN, thread_name_prefix="grammar")
        self._checking: dict[bytes, asyncio.Future[Answer]] = {}
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()  # least recently used first
        self._num_bytes = 0

    @property
    def num_kept(self) -> int:
        """Number of sources whose answers are kept."""
        return len(self._answers)

    @property
    def num_timeouts(self) -> int:
        """Number of checks that were ended because they took too long."""
        return sum(child.num_timeouts for child in self.children)

    def start(self) -> None:
        """Start the first child, so that the first grammar need not wait for it."""
        self._pool.submit(self._start)

    async def check(self, source: GrammarSource) -> Grammar:
        """The grammar of `source`. Raises RequestError naming the field that is wrong or too much,
        OverloadedError when too many wait, UnavailableError when the children do not live."""
        encoded = _encode(source)
        limit = int(self._config.grammar_source_kb * 1024)
        if len(encoded) > limit:
            raise _refused(source.largest_field, f"exceeds {limit >> 10} kB (--grammar_source_kb)")
        key = hashlib.sha256(encoded).digest()
        answer = self._answers.get(key)
        if answer is None:
            if key not in self._checking:
                if len(self._checking) >= _MAX_WAITING:
                    raise OverloadedError("too many grammars wait to be checked", retry_after_s=1.0)
                loop = asyncio.get_running_loop()
                future = loop.run_in_executor(self._pool, self._ask, source, encoded)
                self._checking[key] = future
                future.add_done_callback(lambda done: self._checked(key, done))
            answer = await asyncio.shield(self._checking[key])
        else:
            self._answers.move_to_end(key)
        if answer.error:
            raise _refused(answer.field, answer.error)
        field = source.format.field if source.format and source.calls != "must" else "tools"
        return Grammar(answer.text, field)

    def close(self) -> None:
        """End the processes. Checks that run fail."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in self.children:
            child.close()

    def _start(self) -> None:
        child = self._idle.pop()
        try:
            child.start()
        except OSError:
            pass  # the first grammar tries again
        finally:
            self._idle.append(child)

    def _ask(self, source: GrammarSource, encoded: bytes) -> Answer:
        """The answer of a child. Runs on a thread of the pool, which has a child for each."""
        child = self._idle.pop()
        field, config = source.largest_field, self._config
        try:
            for _ in range(2):  # the second attempt is for a child that died for another reason
                try:
                    return msgspec.json.decode(child.ask(encoded), type=Answer)
                except TimeoutError:
                    break
                except ChildDiedError as death:
                    if problem := _limits(config).get(-death.code):
                        raise _refused(field, problem) from None
            raise UnavailableError("the grammar checker does not answer", retry_after_s=1.0)
        finally:
            self._idle.append(child)

    def _checked(self, key: bytes, done: "asyncio.Future[Answer]") -> None:
        del self._checking[key]
        if done.cancelled() or done.exception():
            return
        answer = done.result()
        self._answers[key] = answer
        self._num_bytes += _size(answer)
        while self._num_bytes > _MAX_KEPT:
            self._num_bytes -= _size(self._answers.popitem(last=False)[1])


def _size(answer: Answer) -> int:
    return len(answer.text) + 1024


def _limits(config: ServeConfig) -> dict[int, str]:
    """The limit that a child has exceeded, by the signal that ended it."""
    seconds, memory = config.grammar_timeout_s, config.grammar_memory_mb
    return {
        signal.SIGPROF: f"checking it takes more than {seconds:g} s (--grammar_timeout_s)",
        signal.SIGABRT: f"checking it takes more than {memory:g} MB (--grammar_memory_mb)",
        signal.SIGSEGV: "is too deep or too complex",
    }


def _refused(field: str, problem: str) -> RequestError:
    return RequestError(f"{field}: {problem}", field=field)
