"""The process that compiles grammars: `python -m glimmer.frontend.grammar.compile_child PID`.

It loads the library and the vocabulary once and then only forks: each grammar is compiled by a
child with limits of memory, file size and time. Whatever a hostile schema does, it does to that
child. The parent of both is the frontend with number PID (`compiler.py`).

Both directions on standard input, a socket: 4 bytes of length, big-endian, then MessagePack. First
comes a `Setup`, answered by "ready"; then any number of `Order`s, each answered by an `Answer`.
"""

import contextlib
import os
import random
import re
import resource
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from ...shared.lifecycle import die_with_parent
from ..text.template import receive, send
from .source import FieldError, GrammarSource, to_ebnf
from .tool_calls import TAGS

VOCABULARY_FILE = "vocabulary.json"  # beside the compiled grammars, for the worker
_WALK_STEPS = 64  # random steps that each new grammar must survive
_MAX_MASK_S = 0.05  # mean time of one mask on that walk
_FRAMES = 4000
_LOG_PREFIX = re.compile(r"^\[[^\]]*\] \S+: ")  # of the library's messages
_encode = msgspec.msgpack.encode


class Setup(msgspec.Struct):
    """Settings of all grammars. `tokens`: bytes of each id, b"" for those without text."""

    directory: str
    tokens: list[bytes]
    added_ids: dict[str, int]
    end_ids: list[int]
    threads: int
    memory_mb: float
    compiled_mb: float
    timeout_s: float


class Order(msgspec.Struct):
    """Compile `source`, a `GrammarSource` as JSON, into file `name`. MessagePack could not hold
    all integers that a schema may have."""

    number: int
    name: str
    source: bytes


class Answer(msgspec.Struct):
    """How order `number` went: size of the file in bytes, or the field that is wrong and why.
    `field` is empty when a limit was exceeded by the whole."""

    number: int
    size: int = 0
    field: str = ""
    error: str = ""


class Library:
    """xgrammar with this vocabulary. Added tokens get bytes that are no UTF-8: no text can spell
    them, a grammar has to name their ids."""

    def __init__(self, setup: Setup) -> None:
        import xgrammar

        self.xgrammar: Any = xgrammar
        self.setup = setup
        tokens = list(setup.tokens)
        for token_id in setup.added_ids.values():
            tokens[token_id] = b"\xff%d" % token_id
        self.info = xgrammar.TokenizerInfo(
            tokens,
            xgrammar.VocabType.RAW,
            vocab_size=len(tokens),
            stop_token_ids=setup.end_ids or [len(tokens) - 1],
        )
        self.tags = {tag: setup.added_ids[tag] for tag in TAGS if tag in setup.added_ids}
        (Path(setup.directory) / VOCABULARY_FILE).write_text(self.info.serialize_json())

    def compile(self, order: Order) -> Answer:
        """Compile, try and store one grammar; runs in a process of its own."""
        source = msgspec.json.decode(order.source, type=GrammarSource)
        field = source.format.field if source.format else source.fields[0]
        try:
            text = to_ebnf(source, self.tags)
            compiler = self.xgrammar.GrammarCompiler(
                self.info, max_threads=self.setup.threads, cache_enabled=False
            )
            compiled = compiler.compile_grammar(text)
            problem = self._walk(compiled)
            if problem:
                return Answer(order.number, field=field, error=problem)
            data = compiled.serialize_json().encode()
        except FieldError as error:
            return Answer(order.number, field=error.field, error=str(error))
        except MemoryError:
            return Answer(order.number, error=_too_much_memory(self.setup))
        except RuntimeError as error:  # the library's own, about user-written EBNF
            if "bad_alloc" in str(error):
                return Answer(order.number, error=_too_much_memory(self.setup))
            problem = _LOG_PREFIX.sub("", str(error).strip())[:300]
            return Answer(order.number, field=field, error=f"is not a valid grammar: {problem}")
        if len(data) > self.setup.compiled_mb * (1 << 20):
            return Answer(order.number, error=_too_large(self.setup))
        path = Path(self.setup.directory) / order.name
        path.with_suffix(".new").write_bytes(data)
        path.with_suffix(".new").rename(path)
        return Answer(order.number, size=len(data))

    def _walk(self, compiled: Any) -> str:
        """Follow the grammar along random tokens: "" or what is wrong with it."""
        matcher = self.xgrammar.GrammarMatcher(compiled)
        mask = self.xgrammar.allocate_token_bitmask(1, len(self.setup.tokens))
        tail = last_word_bits(len(self.setup.tokens))
        rng, started_s, steps = random.Random(0), time.process_time(), 0
        for _ in range(_WALK_STEPS):
            if matcher.is_terminated():
                break
            matcher.fill_next_token_bitmask(mask)
            steps += 1
            words = mask[0].numpy()
            words[-1] &= tail
            filled = words.nonzero()[0]
            if not len(filled):
                return "matches nothing" if steps == 1 else "leads to where no token fits"
            place = int(rng.choice(filled))
            token_id = place * 32 + rng.choice([b for b in range(32) if words[place] >> b & 1])
            if not matcher.accept_token(token_id):
                return "is ambiguous beyond what can be followed"
        if (time.process_time() - started_s) / max(1, steps) > _MAX_MASK_S:
            return f"is too slow to follow: more than {_MAX_MASK_S * 1000:.0f} ms per token"
        return ""


def last_word_bits(vocab_size: int) -> int:
    """The bits of a mask's last word that stand for tokens; the library sets others, too."""
    bits = (1 << (vocab_size - 1) % 32 + 1) - 1
    return bits - (1 << 32) if bits >> 31 else bits


def _too_much_memory(setup: Setup) -> str:
    return f"compiling it takes more than {setup.memory_mb:g} MB (--grammar_memory_mb)"


def _too_large(setup: Setup) -> str:
    return f"compiled, it has more than {setup.compiled_mb:g} MB (--grammar_compiled_mb)"


class Forks:
    """The children at work: one per order, each with a pipe for its answer."""

    def __init__(self, library: Library, link: socket.socket) -> None:
        self._library, self._link = library, link
        self._selector = selectors.DefaultSelector()
        self._selector.register(link, selectors.EVENT_READ)
        self._children: dict[int, tuple[Order, int, float]] = {}  # pipe -> order, pid, deadline

    def run(self) -> None:
        """Serve until the frontend goes."""
        while True:
            deadlines = [deadline for _, _, deadline in self._children.values()]
            wait_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            for key, _ in self._selector.select(wait_s):
                if key.fileobj is not self._link:
                    self._answered(key.fd)
                    continue
                message = receive(self._link)
                if not message:
                    return
                self._start(msgspec.msgpack.decode(message, type=Order))
            now = time.monotonic()
            for pipe, (_, pid, deadline) in list(self._children.items()):
                if now >= deadline:
                    os.kill(pid, signal.SIGKILL)
                    self._answered(pipe, f"{self._library.setup.timeout_s:g} s")

    def _start(self, order: Order) -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _compile_and_exit(self._library, order, writer, self._link)
        os.close(writer)
        deadline = time.monotonic() + self._library.setup.timeout_s
        self._children[reader] = (order, pid, deadline)
        self._selector.register(reader, selectors.EVENT_READ)

    def _answered(self, pipe: int, overdue: str = "") -> None:
        """A child has answered, died, or was killed because its time was over."""
        order, pid, _ = self._children.pop(pipe)
        self._selector.unregister(pipe)
        with os.fdopen(pipe, "rb") as reader:
            data = b"" if overdue else reader.read()
        _, status = os.waitpid(pid, 0)
        setup = self._library.setup
        if data:
            send(self._link, data)
            return
        if overdue:
            error = f"compiling it takes longer than {overdue} (--grammar_timeout_s)"
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ:
            error = _too_large(setup)
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV:
            error = "is nested too deeply to be compiled"
        else:
            error = _too_much_memory(setup)  # the library aborts, or the kernel kills
        with contextlib.suppress(OSError):
            (Path(setup.directory) / order.name).with_suffix(".new").unlink()
        send(self._link, _encode(Answer(order.number, error=error)))


def _compile_and_exit(library: Library, order: Order, writer: int, link: socket.socket) -> None:
    """In the forked child. Never returns."""
    try:
        die_with_parent(os.getppid(), None)
        link.close()
        _limit(library.setup)
        data = _encode(library.compile(order))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(data)
        os._exit(0)
    except BaseException as error:
        os.write(2, f"compiling a grammar failed: {error!r:.500}\n".encode())
        os._exit(1)


def _limit(setup: Setup) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + int(setup.memory_mb * (1 << 20))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    size = int(setup.compiled_mb * (1 << 20)) + 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    sys.setrecursionlimit(_FRAMES)
    with contextlib.suppress(OSError):  # the first to go when the machine runs out of memory
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> int:
    """Answer until the other side goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    die_with_parent(int(sys.argv[1]), None)
    os.nice(5)
    with socket.socket(fileno=0) as link:
        library = Library(msgspec.msgpack.decode(receive(link), type=Setup))
        send(link, b"ready")
        Forks(library, link).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
