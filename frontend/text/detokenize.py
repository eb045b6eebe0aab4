"""Token ids -> text, one sequence at a time.

Bytes are held back until they complete a character. Stop strings are found across token boundaries;
text that may begin one is held back if a match would be removed. Nothing here knows about HTTP.
`tokenizer.py` makes the `Vocabulary`.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ...shared.messages import TokenLogprob


@dataclass(frozen=True)
class Vocabulary:
    """The text of each token id."""

    token_bytes: list[bytes]  # by id; b"" for padding rows of the embedding
    special_ids: frozenset[int]  # left out under skip_special_tokens
    added_ids: dict[str, int]  # text -> id of the tokens that are not BPE pieces

    def text(self, token_id: int) -> str:
        """The text of one token alone. Incomplete characters become U+FFFD."""
        return self.token_bytes[token_id].decode("utf-8", "replace")


@dataclass(frozen=True)
class TextOptions:
    """How a sequence becomes text and what ends it."""

    stop_token_ids: frozenset[int] = frozenset()  # as in SamplingParams: the engine stops there
    hidden_ids: frozenset[int] = frozenset()  # no text for these (the end tokens)
    stop_strings: tuple[str, ...] = ()
    stop_id_sequences: tuple[tuple[int, ...], ...] = ()
    keep_stop: bool = False  # a matched stop string stays in the text, so nothing is held back
    min_new_tokens: int = 0  # stop strings and sequences are ignored before
    skip_special_tokens: bool = False
    add_spaces_between_special_tokens: bool = False
    record_tokens: bool = False  # keep each token's text and logprob


class DecodedToken(NamedTuple):
    """One token: the text it completed, and where in the sequence's text that begins."""

    token_id: int
    text: str
    offset: int
    logprob: TokenLogprob | None


class StopStrings:
    """Finds the first of several strings in a text that arrives in parts.

    One Knuth-Morris-Pratt automaton per string: constant work per character for any text.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [s for s in strings if s]
        self._first_chars = frozenset(s[0] for s in self._strings)
        self._fallbacks = [_fallbacks(s) for s in self._strings]
        self._matched = [0] * len(self._strings)  # characters of each string seen so far

    @property
    def num_partial(self) -> int:
        """Length of the longest suffix of the text that is a prefix of one of the strings."""
        return max(self._matched, default=0)

    def feed(self, text: str) -> int:
        """Add text. When a string is complete: the number of characters from its beginning to the
        end of the text; else 0."""
        if not any(self._matched) and self._first_chars.isdisjoint(text):
            return 0
        for position, char in enumerate(text):
            longest = 0
            for n, string in enumerate(self._strings):
                matched, fallbacks = self._matched[n], self._fallbacks[n]
                while matched and string[matched] != char:
                    matched = fallbacks[matched - 1]
                if string[matched] == char:
                    matched += 1
                if matched == len(string):
                    longest = max(longest, matched)
                    matched = fallbacks[-1]
                self._matched[n] = matched
            if longest:
                return longest + len(text) - position - 1
        return 0


@lru_cache(256)  # the sequences of one request share their stop strings
def _fallbacks(string: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    table, matched = [0] * len(string), 0
    for i in range(1, len(string)):
        while matched and string[matched] != string[i]:
            matched = table[matched - 1]
        if string[matched] == string[i]:
            matched += 1
        table[i] = matched
    return table


class Decoder:
    """Bytes of tokens -> whole characters."""

    def __init__(self, vocabulary: Vocabulary, options: TextOptions) -> None:
        self._bytes = vocabulary.token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        skipped = vocabulary.special_ids if options.skip_special_tokens else frozenset()
        self._silent = options.hidden_ids | skipped
        self._spaces = options.add_spaces_between_special_tokens
        self._added = frozenset(vocabulary.added_ids.values()) if self._spaces else frozenset()
        self._last_was_added: bool | None = None

    def is_silent(self, token_id: int) -> bool:
        """Whether the token has no text under these options."""
        return token_id in self._silent or not self._bytes[token_id]

    def text(self, token_id: int) -> str:
        """The text that the next token completes; may be empty."""
        if token_id in self._silent:
            return ""
        data = self._bytes[token_id]
        if self._spaces:
            added = token_id in self._added
            if self._last_was_added is not None and (added or self._last_was_added):
                data = b" " + data
            self._last_was_added = added
        return self._decode(data)


@dataclass
class TextStream:
    """The text of one sequence while its tokens arrive.

    `finish_reason` is set with the token that ends the sequence ("stop" or "length"); tokens
    after it are ignored. It agrees with the engine's `Finished`, or comes before it when a stop
    string was found: then the engine must be told with an `Abort` (`must_abort`).
    """

    vocabulary: Vocabulary
    options: TextOptions
    max_new_tokens: int
    num_tokens: int = 0
    num_reasoning_tokens: int = 0  # always: the text is not parsed
    finish_reason: str | None = None
    must_abort: bool = False

    def __post_init__(self) -> None:
        options = self.options
        self._decoder = Decoder(self.vocabulary, options)
        self._stops = StopStrings(options.stop_strings) if options.stop_strings else None
        self._ids: list[int] = []
        self._texts: list[str] = []  # released, not taken yet
        self._tokens: list[DecodedToken] = []  # recorded, not taken yet
        self._length = 0  # characters decoded so far, with the held ones
        self._held = ""

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Add tokens. `logprobs` is parallel to `token_ids` or empty."""
        for n, token_id in enumerate(token_ids):
            if self.finish_reason is not None:
                break
            self.num_tokens += 1
            text = self._decoder.text(token_id)
            if self.options.record_tokens:
                logprob = logprobs[n] if logprobs else None
                self._tokens.append(DecodedToken(token_id, text, self._length, logprob))
            self._length += len(text)
            if token_id in self.options.stop_token_ids:
                self.finish_reason = "stop"
            elif self.num_tokens >= self.max_new_tokens:
                self.finish_reason = "length"
            self._texts.append(self._release(text, self._stops) if self._stops else text)
            if self.options.stop_id_sequences:
                self._match_ids(token_id)
        if self.finish_reason is not None:
            self.close(self.finish_reason)

    def close(self, reason: str) -> None:
        """No more tokens follow: release the held text. Bytes of an unfinished character are
        dropped."""
        self._texts.append(self._held)
        self._held = ""

    def take(self) -> tuple[str, list[DecodedToken]]:
        """Text that was not taken before, and the recorded tokens whose text was released."""
        text, self._texts = "".join(self._texts), []
        count = len(self._tokens)
        if self._held:
            released = self._length - len(self._held)
            count = sum(token.offset < released for token in self._tokens)
        taken, self._tokens = self._tokens[:count], self._tokens[count:]
        return text, taken

    def _release(self, text: str, stops: StopStrings) -> str:
        """The text that can be released when `text` is added."""
        if self.num_tokens < self.options.min_new_tokens:
            return text
        cut = stops.feed(text)
        if cut:
            self.must_abort = self.finish_reason is None
            self.finish_reason = "stop"
        if self.options.keep_stop:
            return text
        text = self._held + text
        if cut:
            self._held = ""
            self._length -= cut
            self._tokens = [token for token in self._tokens if token.offset < self._length]
            return text[:-cut]
        released = len(text) - stops.num_partial
        self._held = text[released:]
        return text[:released]

    def _match_ids(self, token_id: int) -> None:
        self._ids.append(token_id)
        if self.finish_reason is not None or self.num_tokens < self.options.min_new_tokens:
            return
        for sequence in self.options.stop_id_sequences:
            if sequence[-1] == token_id and tuple(self._ids[-len(sequence) :]) == sequence:
                self.finish_reason, self.must_abort = "stop", True
