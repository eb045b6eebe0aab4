"""Prompts of exact length for `glimmer bench serve`: random, text, or with a shared prefix.

The completions route gets token ids, whose number is exact. The chat route gets text that encodes
to the same number of tokens; the chat template adds its own. Without a tokenizer it gets as many
common words, which are about one token each, and the server tells how many they were. The same
seed gives the same prompts. Lengths are drawn as `vllm bench serve` draws them: uniform from
floor(len * (1 - ratio)) to ceil(len * (1 + ratio)).
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...shared.errors import UsageError
from .settings import Settings

_TRIES = 8
_COMMON_WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from "
    "or one had by word but not what all were we when your can said there use an each which "
    "she do how their if will up other about out many then them these so some her would make "
    "like him into time has look two more write go see number no way could people my than "
    "first water been call who its now find long down day did get come made may part"
).split()


@dataclass(frozen=True)
class Prompt:
    """Token ids or text of `num_tokens` tokens, and the greatest length of the reply."""

    content: list[int] | str
    num_tokens: int
    output_len: int


def load_tokenizer(name: str, server: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer for `--tokenizer`: a model directory, "demo", "none", or "auto". The latter
    takes the server's model directory if that exists on this machine. Raises UsageError."""
    if name == "none":
        return None
    if name == "demo":
        from ..demo.run import MODEL_DIR

        name = str(MODEL_DIR)
    if name == "auto":
        info = server.get("info")
        directory = info.get("model_dir") if isinstance(info, dict) else None
        if not isinstance(directory, str) or not (Path(directory) / "tokenizer.json").is_file():
            return None
        name = directory
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UsageError(f"--tokenizer {name}: {error}") from None


def make_prompts(
    settings: Settings, tokenizer: Tokenizer | None, number: int, purpose: str
) -> list[Prompt]:
    """Make `number` prompts. Each `purpose` has different prompts and prefixes for the same seed,
    so that the warm-up does not put measured prompts into the prefix cache. Raises UsageError if
    the dataset needs a tokenizer."""
    if tokenizer is None and settings.dataset == "text":
        raise UsageError("--tokenizer DIR is needed for --dataset text")
    rng = random.Random(f"{settings.seed} {purpose}")
    source = _Source(settings, tokenizer, rng)
    prefixes = [source.ids(settings.prefix_len) for _ in range(settings.num_prefixes)]
    return [_prompt(settings, source, prefixes[i % len(prefixes)]) for i in range(number)]


def _prompt(settings: Settings, source: "_Source", prefix: list[int]) -> Prompt:
    length = draw_length(settings.input_len, settings.range_ratio, source.rng)
    output_len = draw_length(settings.output_len, settings.range_ratio, source.rng)
    ids = prefix + source.ids(length)
    if settings.route == "completions":
        return Prompt(ids, len(ids), output_len)
    text, num_tokens = source.text(ids)
    return Prompt(text, num_tokens, output_len)


def draw_length(length: int, ratio: float, rng: random.Random) -> int:
    """A length within `ratio` around `length`, at least 1."""
    if ratio == 0:
        return length
    return rng.randint(max(1, math.floor(length * (1 - ratio))), math.ceil(length * (1 + ratio)))


class _Source:
    """The source of token ids and texts."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer | None, rng: random.Random) -> None:
        self.rng = rng
        self._settings = settings
        self._tokenizer = tokenizer

    def ids(self, number: int) -> list[int]:
        """`number` ids of a passage, or random ones. For chat, random ids are those of words: their
        text encodes to the same ids more often than text of random bytes."""
        if self._settings.dataset == "text":
            book = self._book
            start = self.rng.randrange(len(book))
            passage = book[start:] + book * (number // len(book) + 1)
            return passage[:number]
        if self._tokenizer is None:
            return self.rng.choices(range(self._settings.vocab_size), k=number)
        pool = self._words if self._settings.route == "chat" else self._ordinary
        return self.rng.choices(pool, k=number)

    def text(self, ids: list[int]) -> tuple[str, int]:
        """Text of as many tokens as `ids`, with the same beginning, and its true number of tokens.
        Text may encode to another number of tokens, so it is cut or extended a few times."""
        length = len(ids)
        if self._tokenizer is None:
            return " ".join([_COMMON_WORDS[i % len(_COMMON_WORDS)] for i in ids]), length
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        for _ in range(_TRIES):
            encoded = self._encode(text)
            if len(encoded) == length:
                break
            encoded = encoded[:length] + self.ids(max(0, length - len(encoded)))
            text = self._tokenizer.decode(encoded, skip_special_tokens=False)
        return text, len(self._encode(text))

    def _encode(self, text: str) -> list[int]:
        assert self._tokenizer is not None, "text needs a tokenizer"
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _ordinary(self) -> list[int]:
        """All ids but those of added tokens, which templates and parsers interpret."""
        assert self._tokenizer is not None, "ids without a tokenizer come from --vocab_size"
        added = set(self._tokenizer.get_added_tokens_decoder())
        return sorted(set(self._tokenizer.get_vocab().values()) - added)

    @cached_property
    def _words(self) -> list[int]:
        """Ids of plain words and spaces; all ordinary ids if the vocabulary has none."""
        assert self._tokenizer is not None, "chat needs a tokenizer"
        texts = self._tokenizer.decode_batch([[i] for i in self._ordinary])
        plain = [i for i, t in zip(self._ordinary, texts, strict=True) if _is_word(t)]
        return plain or self._ordinary

    @cached_property
    def _book(self) -> list[int]:
        """The ids of the text that passages are cut from."""
        ids = self._encode(read_text(self._settings.text_file))
        if not ids:
            raise UsageError(f"--text_file {self._settings.text_file} is empty")
        return ids


def read_text(path: Path | None) -> str:
    """The text of a file; None: Python's language reference, 700 kB of English that every
    installation has. Raises UsageError if the file is not UTF-8 text."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text_file {path}: {error}") from None


def _is_word(text: str) -> bool:
    return text == " " or (text.isascii() and text.strip(" ").isalpha())
