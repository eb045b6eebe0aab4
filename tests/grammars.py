"""Grammars for tests: compiled to files for tests below the frontend, and walked along at random
with a library of the bytes and a few longer tokens."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import xgrammar
from glimmer.frontend.grammar.compile_child import Library, Order, Setup
from glimmer.frontend.grammar.source import GrammarSource, OutputFormat
from glimmer.frontend.text.detokenize import Vocabulary
from glimmer.shared.messages import Grammar

TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
WORDS = (b'", "', b'": ', b'", ', b"}}", b"00", b'{"', "é".encode())
TAG_IDS = {tag: 256 + len(WORDS) + n for n, tag in enumerate(TAGS)}
END = 256 + len(WORDS) + len(TAGS)
TOKENS = [
    *(bytes([n]) for n in range(256)),
    *WORDS,
    *(b"\xff%d" % n for n in range(len(TAGS))),
    b"",
]
_CLOSING = frozenset(b'"}],')

Walk = Callable[[str, int], str | None]


class GrammarFiles:
    """A directory of compiled grammars for one vocabulary."""

    def __init__(self, directory: Path, vocabulary: Vocabulary, end_ids: tuple[int, ...]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        tokens, added = vocabulary.token_bytes, vocabulary.added_ids
        setup = Setup(str(directory), tokens, added, list(end_ids), 1, 4096.0, 256.0, 60.0)
        self._library = Library(setup)
        self._count = 0

    def make(self, kind: Any, source: Any = None, **fields: Any) -> Grammar:
        """A format's grammar; `fields` are those of `Grammar`."""
        return self.compile(GrammarSource(OutputFormat(kind, source, "field")), **fields)

    def compile(self, source: GrammarSource, **fields: Any) -> Grammar:
        """Any source's."""
        self._count += 1
        name = f"grammar{self._count}"
        answer = self._library.compile(Order(self._count, name, msgspec.json.encode(source)))
        assert not answer.error, answer
        return Grammar(name, str(self._directory / name), **fields)


def make_walk() -> Walk:
    """walk(EBNF, seed): a random text of the grammar, tags included; None if it does not end.
    AssertionError when the walk gets stuck."""
    info = xgrammar.TokenizerInfo(
        TOKENS, xgrammar.VocabType.RAW, vocab_size=len(TOKENS), stop_token_ids=[END]
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=True)
    mask = xgrammar.allocate_token_bitmask(1, len(TOKENS))
    shown = {i: tag.encode() for tag, i in TAG_IDS.items()}

    def go(text: str, seed: int) -> str | None:
        matcher: Any = xgrammar.GrammarMatcher(compiler.compile_grammar(text))
        rng, out = random.Random(seed), b""
        for _ in range(3000):
            matcher.fill_next_token_bitmask(mask)
            words = [int(word) for word in mask[0]]
            legal = [i for i in range(len(TOKENS)) if words[i // 32] >> i % 32 & 1]
            assert legal, f"stuck after {out!r}"
            last = [i for i in legal if i in _CLOSING or i == END]
            token = rng.choice(last if last and rng.random() < 0.5 else legal)
            assert matcher.accept_token(token), f"token {token} after {out!r}"
            if token == END:
                return out.decode("utf-8", "replace")
            out += shown.get(token, TOKENS[token])
        return None

    return go
