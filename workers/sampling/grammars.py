"""Grammars of constrained rows on rank 0: which tokens each of them may sample next.

Each row belongs to one of a few threads, which does all of the row's work, in order, while the step
runs: building its matcher, following its outputs so far and, once a token is known, computing the
mask for the next one. The library releases Python's lock meanwhile. `masks` waits for the masks
that it returns.

A mask is one bit per token id in 32-bit words, on the host: [ceil(vocab_size / 32)]. Sampling needs
it, the forward pass does not, so it is copied to the device between two CUDA graphs.
"""

import enum
import logging
import threading
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, KeysView, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import Tensor

from ...shared.grammar import make_matcher, read_tokenizer
from ...shared.messages import Grammar, RowAdmit
from ..memory.host import usable_cores

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)
Mask: TypeAlias = "array[int]"  # of 32-bit words
T = TypeVar("T")
_STACK_BYTES = 64 << 20  # virtual; building a matcher recurses, frontends check with less
_MAX_BASES = 32  # matchers at the start of a grammar that are kept for further rows


class GrammarRows:
    """One matcher for each row that has a grammar, and the threads that work on them.

    The library reads the vocabulary of `model_dir` at once, on a thread. If it cannot be read,
    rows with a grammar fail.
    """

    def __init__(self, model_dir: Path, vocab_size: int, num_threads: int | None = None) -> None:
        self._num_words = -(-vocab_size // 32)
        num_threads = num_threads or max(1, min(8, usable_cores() // 4))
        num_bases = max(4, _MAX_BASES // num_threads)
        stack_bytes = threading.stack_size(_STACK_BYTES)
        try:
            self._threads = [_Thread(num_bases) for _ in range(num_threads)]
        finally:
            threading.stack_size(stack_bytes)
        self._vocabulary = self._threads[0].pool.submit(read_tokenizer, model_dir, vocab_size)
        self._rows: dict[int, _Row] = {}

    def preload(self) -> None:
        """Wait until the vocabulary is read. Reading holds Python's lock for a second, which would
        delay the steps of other requests."""
        if (error := self._vocabulary.exception()) is not None:
            logger.info("rows cannot have grammars: %s", error)

    @property
    def rows(self) -> KeysView[int]:
        """Rows that have a grammar."""
        return self._rows.keys()

    def admit(self, admit: RowAdmit) -> None:
        """Set or drop the row's grammar, which its outputs so far have followed."""
        self.free(admit.row)
        if admit.grammar is None:
            return
        thread = min(self._threads, key=lambda thread: thread.num_rows)
        thread.num_rows += 1
        row = _Row(admit.grammar, admit.sampling.stop_token_ids, self._num_words, thread)
        self._rows[admit.row] = row
        _start({row: partial(row.start, self._vocabulary, admit.output_ids)})

    def free(self, row: int) -> None:
        """The row has no grammar any more."""
        if (old := self._rows.pop(row, None)) is not None:
            old.thread.num_rows -= 1

    def advance(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Start work on the next masks: these tokens were sampled."""
        new: defaultdict[_Row, list[int]] = defaultdict(list)
        for row, token_id in zip(rows, token_ids, strict=True):
            if row in self._rows:
                new[self._rows[row]].append(token_id)
        _start({row: partial(row.advance, ids) for row, ids in new.items()})

    def masks(self, rows: Sequence[int]) -> tuple[list[int], Tensor]:
        """For a batch of rows: the indices [n] of those with a grammar, and their masks [n, words]
        int32 on the host."""
        indices = [index for index, row in enumerate(rows) if row in self._rows]
        found = [self._rows[rows[index]] for index in indices]
        _wait(found)
        return indices, self._stack([row.mask for row in found])

    def look_ahead(self, rows: Sequence[int], guesses: Sequence[Sequence[int]]) -> Tensor:
        """For rows with a grammar and n guessed tokens of each: the masks before each guess and
        after the last one [len(rows) * (n + 1), words] int32. No row moves. Masks after a guess
        that is not allowed are 0."""
        found = [self._rows[row] for row in rows]
        pairs = list(zip(found, guesses, strict=True))
        _start({row: partial(row.look_ahead, ids) for row, ids in pairs})
        _wait(found)
        nothing = array("I", bytes(4 * self._num_words))
        masks: list[Mask] = []
        for row, ids in pairs:
            masks += row.masks_ahead
            masks += [nothing] * (1 + len(ids) - len(row.masks_ahead))
        return self._stack(masks)

    def errors(self, rows: Iterable[int]) -> dict[int, tuple[int, str]]:
        """Of these rows, those whose grammar failed in the masks that were last asked for: how many
        of the tokens sampled with them are right, and why the row cannot have more."""
        found = {row: self._rows[row] for row in rows if row in self._rows}
        return {row: (state.num_right, state.error) for row, state in found.items() if state.error}

    def _stack(self, masks: Sequence[Mask]) -> Tensor:
        if not masks:
            return torch.empty(0, self._num_words, dtype=torch.int32)
        words = bytearray().join(masks)
        return torch.frombuffer(words, dtype=torch.int32).view(len(masks), self._num_words)

    def close(self) -> None:
        """End the threads, after the work that they have begun."""
        for thread in self._threads:
            thread.pool.shutdown(cancel_futures=True)


class _Thread:
    """A thread, and the matchers at the start of a grammar that only it uses. Copies of a matcher
    share the states of its lexer behind one lock: on two threads they would wait for each other."""

    def __init__(self, num_bases: int) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self.pool.submit(int).result()  # start it now, for its size of stack
        self.num_rows = 0
        self._num_bases = num_bases
        self._bases: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, vocabulary: "LLTokenizer", text: str, *, is_new: bool = False) -> "LLMatcher":
        """At the start of the grammar. `is_new`: with no state of its lexer from before."""
        base = None if is_new else self._bases.get(text)
        if base is None:
            base = make_matcher(vocabulary, text)
        self._bases[text] = base
        self._bases.move_to_end(text)
        if len(self._bases) > self._num_bases:
            self._bases.popitem(last=False)
        return base.deep_copy()


def _start(calls: "dict[_Row, Callable[[], None]]") -> None:
    """Let each row's thread make the row's call."""
    by_thread: defaultdict[_Thread, list[_Row]] = defaultdict(list)
    for row in calls:
        by_thread[row.thread].append(row)

    def run(rows: list[_Row]) -> None:
        for row in rows:
            row.guard(calls[row])

    for thread, rows in by_thread.items():
        work = thread.pool.submit(run, rows)
        for row in rows:
            row.work = work


def _wait(rows: "Sequence[_Row]") -> None:
    for row in rows:
        row.work.result()


class _State(enum.Enum):
    FREE = enum.auto()  # before `start_id`
    FOLLOWING = enum.auto()
    OVER = enum.auto()  # matched to its end, or ended by a token that does not fit


class _LimitError(Exception):
    """The library cannot follow the grammar any further."""


class _Row:
    """One row, its state in its grammar and the mask for its next token. All methods run on its
    thread."""

    def __init__(
        self, grammar: Grammar, stop_ids: tuple[int, ...], num_words: int, thread: _Thread
    ) -> None:
        self.thread = thread
        self.work: Future[None]  # the last call
        self.mask: Mask = _filled(num_words)
        self.masks_ahead: list[Mask] = []
        self.error = ""
        self.num_right = 0  # with an error: as `GrammarRows.errors` says
        self._grammar = grammar
        self._stop_ids = stop_ids
        self._num_words = num_words
        self._state = _State.FREE if grammar.start_id >= 0 else _State.FOLLOWING
        self._num_tokens = 0  # outputs
        self._vocabulary: LLTokenizer
        self._matcher: LLMatcher
        self._matched: list[int] = []  # tokens that the matcher has consumed
        self._end_id = -1  # its bit in the library's masks says that the output may end

    def guard(self, call: Callable[[], None]) -> None:
        """Make a call. Whatever goes wrong in the library, panics included, ends only this row."""
        if self.error and not self.num_right:
            return
        try:
            call()
        except BaseException as error:
            self._fail(error, 0)
            self.mask = self._stop_mask()
            self.masks_ahead = [self.mask]

    def start(self, vocabulary: "Future[LLTokenizer]", token_ids: Sequence[int]) -> None:
        """Follow the outputs so far."""
        self._vocabulary = vocabulary.result()
        self._end_id = self._vocabulary.eos_token
        self._matcher = self.thread.matcher(self._vocabulary, self._grammar.text)
        self._try(lambda matcher: None)  # it may be a copy of one that has hit a limit
        self.advance(token_ids)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Follow new outputs."""
        self.error = ""  # of guesses
        for token_id in token_ids:
            self._num_tokens += 1
            self._accept(token_id)
        self.mask = self._make_mask()

    def look_ahead(self, token_ids: Sequence[int]) -> None:
        """Make the masks before each of these tokens and after the last one, and come back. A limit
        on the way ends the row only if the tokens before it are really sampled."""
        masks = self.masks_ahead = [self.mask]
        state, num_matched = self._state, len(self._matched)
        try:
            for token_id in token_ids:
                if not masks[-1][token_id // 32] >> token_id % 32 & 1:
                    break
                self._accept(token_id)
                masks.append(self._make_mask())
            has_failed = not self._matcher.rollback(len(self._matched) - num_matched)
        except BaseException as error:
            self._fail(error, len(masks))
            masks.append(self._stop_mask())
            has_failed = True
        self._state = state
        del self._matched[num_matched:]
        if has_failed:
            self._renew()

    def _accept(self, token_id: int) -> None:
        """A token that does not fit (the mask was overruled) ends the grammar."""
        if self._state is _State.FREE:
            if token_id == self._grammar.start_id:
                self._state = _State.FOLLOWING
        elif self._state is _State.FOLLOWING:
            is_end = token_id in self._stop_ids or token_id == self._end_id
            if is_end or not self._try(lambda matcher: matcher.try_consume_tokens([token_id])):
                self._state = _State.OVER
                return
            self._matched.append(token_id)
            if self._matcher.is_stopped():
                self._state = _State.OVER

    def _make_mask(self) -> Mask:
        """For the next token. It always allows one."""
        if self._state is _State.OVER:
            return self._stop_mask()
        mask = _filled(self._num_words)
        if self._state is _State.FREE:
            _clear(mask, (*self._grammar.banned_ids, *self._stop_ids))
            return mask
        address, num_words = mask.buffer_info()
        self._try(lambda matcher: matcher.unsafe_compute_mask_ptr(address, 4 * num_words))
        _clear(mask, (self._end_id, *self._stop_ids))
        if self._matcher.is_accepting():
            _set(mask, self._stop_ids)
        is_empty = mask.tobytes() == bytes(4 * num_words)
        return self._stop_mask() if is_empty else mask

    def _stop_mask(self) -> Mask:
        """Only stop tokens, or anything if there are none."""
        if not self._stop_ids:
            return _filled(self._num_words)
        mask = array("I", bytes(4 * self._num_words))
        _set(mask, self._stop_ids)
        return mask

    def _try(self, call: "Callable[[LLMatcher], T]") -> T:
        """Call the library, and again with a new matcher if a limit was hit: states of the lexer
        count for all copies of a matcher together. Raises _LimitError if it is hit again."""
        result = call(self._matcher)
        if self._matcher.is_error():
            self._renew()
            result = call(self._matcher)
            self._check()
        return result

    def _renew(self) -> None:
        """Build a matcher anew and bring it to where the row is."""
        text = self._grammar.text
        self._matcher = self.thread.matcher(self._vocabulary, text, is_new=True)
        self._matcher.try_consume_tokens(self._matched)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _LimitError(self._matcher.get_error())

    def _fail(self, error: BaseException, num_right: int) -> None:
        count = self._num_tokens + num_right
        reason = (str(error) or repr(error)).partition("\n")[0]
        self.error = f"the grammar cannot be followed after {count} tokens: {reason}"
        self.num_right = num_right


def _filled(num_words: int) -> Mask:
    return array("I", b"\xff" * (4 * num_words))


def _set(mask: Mask, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        mask[token_id // 32] |= 1 << token_id % 32


def _clear(mask: Mask, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        mask[token_id // 32] &= ~(1 << token_id % 32)
