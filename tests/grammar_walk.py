"""A library with the bytes and a few longer tokens, and a random walk along a grammar."""

import random
from collections.abc import Callable
from typing import Any

import xgrammar

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
