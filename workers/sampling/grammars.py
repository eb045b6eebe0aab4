"""Grammars of constrained rows on rank 0: which tokens each of them may sample next.

One thread does all the work, in order, while the step runs: loading a grammar, following a new
row's outputs so far, and, once a row's token is known, computing the mask for its next one. The
library releases Python's lock meanwhile. `masks` waits for the masks that it returns.

A mask is one bit per token id in int32 words, on the host: [ceil(vocab_size / 32)]. Sampling needs
it, the forward pass does not, so it is copied to the device between two CUDA graphs.
"""

import enum
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...shared.messages import Grammar, RowAdmit
from ..memory.host import usable_cores

logger = logging.getLogger(__name__)
VOCABULARY_FILE = "vocabulary.json"  # in the directory of each compiled grammar
OnLoaded = Callable[[str, str], None]  # (name, error)


class GrammarRows:
    """The grammars that are loaded, and one matcher for each row that has one."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._last_word = _signed((1 << (vocab_size - 1) % 32 + 1) - 1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._library = _Library()
        self._compiled: dict[str, Any] = {}
        self._rows: dict[int, _Row] = {}

    @property
    def names(self) -> set[str]:
        """Grammars that are loaded."""
        return set(self._compiled)

    @property
    def rows(self) -> set[int]:
        """Rows that have a matcher."""
        return set(self._rows)

    def preload(self) -> None:
        """Import the library now: later it would slow the steps of other requests."""
        self._thread.submit(self._library.start).result()

    def load(self, grammar: Grammar, on_loaded: OnLoaded) -> None:
        """Read a compiled grammar; then call `on_loaded` on the thread of the grammars."""

        def run() -> None:
            error = ""
            try:
                self._compiled[grammar.name] = self._library.read(Path(grammar.path))
            except (OSError, RuntimeError, ValueError) as problem:
                logger.error("grammar %s: %s", grammar.path, problem)
                error = f"{type(problem).__name__}: {problem}"[:300]
            on_loaded(grammar.name, error)

        self._thread.submit(run)

    def drop(self, names: Sequence[str]) -> None:
        """Drop grammars that no row will use any more."""
        for name in names:
            self._thread.submit(self._compiled.pop, name, None)

    def admit(self, admit: RowAdmit) -> None:
        """Set or drop the row's grammar, which its outputs so far have followed. If the grammar was
        not loaded, `masks` raises KeyError."""
        self.free(admit.row)
        grammar = admit.grammar
        if grammar is None:
            return
        row = self._rows[admit.row] = _Row(grammar, admit.sampling.stop_token_ids)

        def run() -> Tensor:
            row.matcher = self._library.matcher(self._compiled[grammar.name], row.stop_ids)
            for token_id in admit.matched_ids:
                row.accept(token_id)
            return self._fill([row])

        row.mask = (self._thread.submit(run), 0)

    def free(self, row: int) -> None:
        """The row has no grammar any more."""
        self._rows.pop(row, None)

    def advance(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Start work on the next masks: these tokens were sampled."""
        pairs = zip(rows, token_ids, strict=True)
        steps = [(self._rows[row], token_id) for row, token_id in pairs if row in self._rows]
        if not steps:
            return

        def run() -> Tensor:
            for row, token_id in steps:
                row.accept(token_id)
            return self._fill([row for row, _ in steps])

        masks = self._thread.submit(run)
        for index, (row, _) in enumerate(steps):
            row.mask = (masks, index)

    def masks(self, rows: Sequence[int]) -> tuple[list[int], Tensor]:
        """For a batch of rows: the indices [n] of those with a grammar, and their masks [n, words]
        int32 on the host."""
        indices = [index for index, row in enumerate(rows) if row in self._rows]
        if not indices:
            return [], torch.empty(0, self._num_words, dtype=torch.int32)
        pending = (self._rows[rows[index]].mask for index in indices)
        return indices, torch.stack([masks.result()[index] for masks, index in pending])

    def look_ahead(self, row: int, token_ids: Sequence[int]) -> Tensor:
        """The masks before each of n guessed tokens and after the last one [n + 1, words]. The row
        must have a grammar, and does not move. Masks after a guess that is not allowed are 0."""
        state = self._rows[row]
        return self._thread.submit(self._look_ahead, state, token_ids).result()

    def _look_ahead(self, row: "_Row", token_ids: Sequence[int]) -> Tensor:
        state = row.state
        masks, steps = [self._fill([row])[0]], 0
        for token_id in token_ids:
            if not int(masks[-1][token_id // 32]) >> token_id % 32 & 1:
                break
            steps += row.is_following
            row.accept(token_id)
            masks.append(self._fill([row])[0])
        if steps:
            row.matcher.rollback(steps)
        row.state = state
        nothing = torch.zeros(self._num_words, dtype=torch.int32)
        return torch.stack(masks + [nothing] * (len(token_ids) + 1 - len(masks)))

    def _fill(self, rows: list["_Row"]) -> Tensor:
        """The masks of rows [len(rows), words]. None is empty: the last ones allow stop tokens."""
        masks = torch.full((len(rows), self._num_words), -1, dtype=torch.int32)
        following = [index for index, row in enumerate(rows) if row.is_following]
        if following:
            self._library.fill([rows[index].matcher for index in following], masks, following)
            masks[:, -1] &= self._last_word  # the library sets bits of no token, too
        filled = masks.any(1).tolist()
        for mask, row, is_filled in zip(masks, rows, filled, strict=True):
            if row.state is _State.FREE:
                _set(mask, (*row.grammar.banned_ids, *row.stop_ids), False)
            elif (row.state is _State.OVER or not is_filled) and row.stop_ids:
                _set(mask.zero_(), row.stop_ids, True)
        return masks

    def close(self) -> None:
        """End the thread, after the work that it has begun."""
        self._thread.shutdown(cancel_futures=True)


class _Library:
    """xgrammar, imported with the first grammar (the import takes a second), and its vocabulary."""

    def __init__(self) -> None:
        self._xgrammar: Any = None
        self._vocabulary: Any = None
        self._batch: Any = None
        self._num_threads = max(1, min(8, usable_cores() // 4))

    def start(self) -> None:
        if self._xgrammar is None:
            import xgrammar

            self._xgrammar = xgrammar

    def read(self, path: Path) -> Any:
        self.start()
        if self._vocabulary is None:  # every frontend has the same one
            text = path.with_name(VOCABULARY_FILE).read_text()
            self._vocabulary = self._xgrammar.TokenizerInfo.deserialize_json(text)
        read = self._xgrammar.CompiledGrammar.deserialize_json
        return read(path.read_text(), self._vocabulary)

    def fill(self, matchers: list[Any], masks: Tensor, indices: list[int]) -> None:
        if self._batch is None:
            self._batch = self._xgrammar.BatchGrammarMatcher(max_threads=self._num_threads)
        self._batch.batch_fill_next_token_bitmask(matchers, masks, indices)

    def matcher(self, compiled: Any, stop_ids: tuple[int, ...]) -> Any:
        return self._xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(stop_ids))


class _State(enum.Enum):
    FREE = enum.auto()  # before `start_id`
    FOLLOWING = enum.auto()
    OVER = enum.auto()  # matched to its end, or ended by a token that does not fit


class _Row:
    """One row and its state in its grammar."""

    def __init__(self, grammar: Grammar, stop_ids: tuple[int, ...]) -> None:
        self.grammar = grammar
        self.stop_ids = stop_ids
        self.matcher: Any = None
        self.mask: tuple[Future[Tensor], int]  # masks of several rows, and the index of this row's
        self.state = _State.FREE if grammar.start_id >= 0 else _State.FOLLOWING

    @property
    def is_following(self) -> bool:
        """Whether the matcher sees the row's tokens."""
        return self.state is _State.FOLLOWING

    def accept(self, token_id: int) -> None:
        """A token that does not fit (the mask was overruled) ends the grammar."""
        if self.state is _State.FREE:
            if token_id == self.grammar.start_id:
                self.state = _State.FOLLOWING
        elif self.state is _State.FOLLOWING and (
            not self.matcher.accept_token(token_id) or self.matcher.is_terminated()
        ):
            self.state = _State.OVER


def _set(mask: Tensor, token_ids: Sequence[int], value: bool) -> None:
    for token_id in token_ids:
        bit = 1 << token_id % 32
        word = int(mask[token_id // 32]) & 0xFFFFFFFF
        mask[token_id // 32] = _signed(word | bit if value else word & ~bit)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
