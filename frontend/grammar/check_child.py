"""The process that checks grammars: `python -m glimmer.frontend.grammar.check_child PID`.

A hostile grammar can take minutes, exhaust the memory or overflow the stack of the process that
reads it. This one has limits of all three, and may die. The worker gets only grammars that have
passed. `checker.py` starts it and says which messages it answers.
"""

import contextlib
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from ...shared.grammar import END_TOKEN, make_matcher
from ..child import serve
from .source import FieldError, GrammarSource, compose
from .tool_calls import TAGS

_WALK_STEPS = 32  # random tokens that each grammar must follow
_MAX_MASK_S = 0.02  # mean time of one mask on that walk
_FRAMES = 4000
_STACK = 8 << 20  # bytes; threads of the worker that read grammars have more


class Setup(msgspec.Struct):
    """Settings of all grammars: the vocabulary's size and added tokens, and the limits of one."""

    vocab_size: int
    added_ids: dict[str, int]
    memory_mb: float
    timeout_s: float  # processor time


class Answer(msgspec.Struct):
    """The grammar of a source, or the field that is wrong and why."""

    text: str = ""
    field: str = ""
    error: str = ""


class ByteVocabulary:
    """For the library: one token for each byte, and the added tokens of the model by their ids.
    That is enough: a grammar allows a text or does not, however it is split into tokens."""

    bos_token_id = None

    def __init__(self, setup: Setup) -> None:
        added = setup.added_ids
        self.tokens = [b""] * setup.vocab_size
        for text, token_id in added.items():
            self.tokens[token_id] = text.encode()
        ids = set(added.values())
        self.byte_ids = [i for i in range(setup.vocab_size) if i not in ids][:256]
        for byte, token_id in enumerate(self.byte_ids):
            self.tokens[token_id] = bytes([byte])
        self.eos_token_id = added.get(END_TOKEN, min(ids, default=setup.vocab_size - 1))
        self.special_token_ids = [*ids] or [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        """Its tokens."""
        return [self.byte_ids[byte] for byte in text]


class Library:
    """llguidance with this vocabulary."""

    def __init__(self, setup: Setup) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = ByteVocabulary(setup)
        size, end = setup.vocab_size, vocabulary.eos_token_id
        wrapper = TokenizerWrapper(vocabulary)
        self.tokenizer = LLTokenizer(wrapper, n_vocab=size, eos_token=end, slices=[])
        self._ids = [*vocabulary.byte_ids, *vocabulary.special_token_ids]

    def problem(self, text: str) -> str:
        """The library's error about a grammar, or "". The grammar is followed along random
        tokens."""
        matcher = make_matcher(self.tokenizer, text)
        rng, started_s = random.Random(0), time.process_time()
        for _ in range(_WALK_STEPS):
            if matcher.is_stopped() and not matcher.reset():
                break
            mask = matcher.compute_bitmask()
            if matcher.is_error():
                break
            legal = [i for i in self._ids if mask[i >> 3] >> (i & 7) & 1]
            matcher.consume_token(rng.choice(legal))
        if matcher.is_error():
            return _short(matcher.get_error())
        if (time.process_time() - started_s) / _WALK_STEPS > _MAX_MASK_S:
            return f"is too slow to follow: more than {_MAX_MASK_S * 1000:.0f} ms per token"
        return ""


def _short(error: str) -> str:
    """The library's error as one line for a client."""
    if error.startswith("NoExtension"):
        return "matches nothing"
    if re.search("Too many items|too complex|row has .* items", error):
        return "is too complex, or has no end"
    text = re.split(r"\n +\d+ \| |\n<", error)[0].strip()
    text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)
    if found := re.search(r"(?s)regex parse error:.*^error: (.*)", text, re.MULTILINE):
        text = f"is not a valid pattern: {found[1]}"
    if found := re.search(r'Unimplemented keys: \["([^"]*)"', text):
        text = f"{found[1]} is not supported"
    return text.splitlines()[0][:200] if text else "is not a valid grammar"


def make_answer(data: bytes) -> Callable[[bytes], bytes]:
    """A function from a `GrammarSource` to an `Answer`, both as JSON: MessagePack could not hold
    all integers that a schema may have."""
    setup = msgspec.json.decode(data, type=Setup)
    os.nice(5)
    library = Library(setup)
    tags = {tag: setup.added_ids[tag] for tag in TAGS if tag in setup.added_ids}
    _limit(setup)

    def answer(message: bytes) -> bytes:
        # The signal ends the process, which cannot handle it while the library works.
        signal.setitimer(signal.ITIMER_PROF, setup.timeout_s)
        source = msgspec.json.decode(message, type=GrammarSource)
        try:
            found = Answer(text=compose(source, tags, library.problem))
        except FieldError as error:
            found = Answer(field=error.field, error=str(error))
        except MemoryError:
            os.abort()  # as the library does
        except RecursionError:
            found = Answer(field=source.largest_field, error="is nested too deeply")
        signal.setitimer(signal.ITIMER_PROF, 0)
        return msgspec.json.encode(found)

    return answer


def _limit(setup: Setup) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + int(setup.memory_mb * (1 << 20))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK, resource.RLIM_INFINITY))
    sys.setrecursionlimit(_FRAMES)
    with contextlib.suppress(OSError):  # the first to go when the machine runs out of memory
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    sys.exit(serve(make_answer))
