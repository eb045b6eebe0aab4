"""CUDA graphs of decode steps: captured once per batch size and number of drafts, replayed with any
rows.

A graph reads row numbers from a fixed buffer and everything else (last tokens, drafts, lengths,
pages) from the row table on the device, so a replay needs one small copy. Batches are padded to
the captured size with the scratch row. Sampling is not in a graph: grammar masks and penalties
differ from step to step. With drafts a step therefore has two graphs, before and after sampling.
"""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..shared.messages import MAX_DRAFT_TOKENS
from .inputs import SamplingPoints
from .rows import RowTable

logger = logging.getLogger(__name__)

_SIZES = (1, 2, 4, 8, 12, *range(16, 65, 8), *range(80, 257, 16))
_STEP = 32  # above those
_DRAFT_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)  # times number of drafts

# The part before sampling: rows [n] int64, number of drafts k, logits [n * (k + 1), vocab] float32
# to fill -> sampling points, and states for the part after sampling, which there is with drafts.
Before = Callable[[Tensor, int, Tensor], tuple[SamplingPoints, Tensor | None]]
# The part after sampling: rows [n], number of drafts k, sampled ids [n * (k + 1)] int64, states.
# -> number of new tokens [n] int64
After = Callable[[Tensor, int, Tensor, Tensor], Tensor]


def batch_sizes(largest: int, num_drafts: int = 0) -> list[int]:
    """Batch sizes to capture, ascending, close enough that there is little padding."""
    sizes = [*_SIZES, *range(_SIZES[-1] + _STEP, largest + _STEP, _STEP)]
    if num_drafts:
        largest = min(largest, MAX_DRAFT_TOKENS // (num_drafts + 1))
        sizes = list(_DRAFT_SIZES)
    return [size for size in sizes if size < largest] + [largest]


def covering_size(sizes: Sequence[int], count: int) -> int | None:
    """The least of the ascending sizes that holds `count`; None if there is none, or nothing to
    hold."""
    if count < 1:
        return None
    return next((size for size in sizes if size >= count), None)


class DecodeGraphs:
    """The graphs of one rank's decode steps. `prepare` is called before a captured function runs
    for the first time, with the rows that it will run with."""

    def __init__(
        self,
        before: Before,
        after: After | None,
        prepare: Callable[[Sequence[int]], None],
        table: RowTable,
        vocab_size: int,
        largest: int,
    ) -> None:
        self._run_before, self._run_after, self._prepare = before, after, prepare
        self._scratch_row = table.scratch_row
        self.sizes = {k: batch_sizes(largest, k) for k in range(table.max_drafts + 1)}
        tokens = max(sizes[-1] * (k + 1) for k, sizes in self.sizes.items())
        device = table.device
        self._rows = torch.full((largest,), self._scratch_row, dtype=torch.int64, device=device)
        # Graphs write here, or each of them would keep logits of its own.
        self._logits = torch.empty(tokens, vocab_size, dtype=torch.float32, device=device)
        self._sampled = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._before: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._after: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._points: dict[tuple[int, int], SamplingPoints] = {}
        self._states: dict[tuple[int, int], Tensor] = {}
        self._num_tokens: dict[tuple[int, int], Tensor] = {}
        self._filled: list[int] = []  # row numbers in the buffer

    @property
    def num_steps(self) -> int:
        """How many kinds of steps there are graphs for."""
        return sum(map(len, self.sizes.values()))

    def run_largest(self) -> None:
        """Run the largest steps eagerly on the scratch row, to measure what they need."""
        for num_drafts, sizes in self.sizes.items():
            self._run(sizes[-1], num_drafts)

    def capture(self, pool: Any, report: Callable[[int, int], None]) -> None:
        """Capture all, largest first (the smaller ones then fit into its memory).
        `report(done, total)` is called after each."""
        keys = [(size, k) for k, sizes in self.sizes.items() for size in sizes]
        keys.sort(key=lambda key: key[0] * (key[1] + 1), reverse=True)
        for done, key in enumerate(keys):
            self._run(*key)  # compiles and sizes workspaces, which a capture must not
            torch.cuda.synchronize()
            self._capture(pool, *key)
            report(done + 1, len(keys))

    def padded(self, rows: Sequence[int], num_drafts: int) -> list[int] | None:
        """The rows that a replay for these runs: padded to a captured size. None if no graph
        covers a decode step of so many rows with so many drafts each."""
        if not self._before:
            return None
        size = covering_size(self.sizes.get(num_drafts, ()), len(rows))
        if size is None:
            return None
        return [*rows, *[self._scratch_row] * (size - len(rows))]

    def replay(
        self, padded: list[int], num_rows: int, num_drafts: int
    ) -> tuple[Tensor, SamplingPoints]:
        """The part before sampling, for rows from `padded`, of which `num_rows` count. -> logits
        [num_rows * (num_drafts + 1), vocab] float32 and their points, valid until the next
        replay."""
        if self._filled[: len(padded)] != padded:
            host = torch.tensor(padded, dtype=torch.int64, pin_memory=self._rows.is_cuda)
            self._rows[: len(padded)].copy_(host, non_blocking=True)
            self._filled[: len(padded)] = padded
        key = len(padded), num_drafts
        self._before[key].replay()
        count = num_rows * (num_drafts + 1)
        rows, positions, drafts = self._points[key]
        drafts = None if drafts is None else drafts[:count]
        return self._logits[:count], SamplingPoints(rows[:count], positions[:count], drafts)

    def finish(self, size: int, num_rows: int, num_drafts: int, ids: Tensor) -> Tensor:
        """The part after sampling, of the step that was replayed with `size` padded rows; ids
        [num_rows * (num_drafts + 1)] int64 were sampled. -> number of new tokens [num_rows] int64,
        valid until the next replay."""
        self._sampled[: len(ids)] = ids
        self._after[size, num_drafts].replay()
        return self._num_tokens[size, num_drafts][:num_rows]

    def _run(self, size: int, num_drafts: int) -> None:
        tokens, rows = size * (num_drafts + 1), self._rows[:size]
        self._prepare([self._scratch_row] * size)
        _, states = self._run_before(rows, num_drafts, self._logits[:tokens])
        if self._run_after is not None and states is not None:
            self._run_after(rows, num_drafts, self._sampled[:tokens], states)

    def _capture(self, pool: Any, size: int, num_drafts: int) -> None:
        key, tokens, rows = (size, num_drafts), size * (num_drafts + 1), self._rows[:size]
        self._before[key] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._before[key], pool=pool):
            points, states = self._run_before(rows, num_drafts, self._logits[:tokens])
        self._points[key] = points
        if self._run_after is None or states is None:
            return
        self._states[key] = states  # the graph after sampling reads it: its memory is not reused
        self._after[key] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._after[key], pool=pool):
            num_tokens = self._run_after(rows, num_drafts, self._sampled[:tokens], states)
        self._num_tokens[key] = num_tokens


@contextlib.contextmanager
def capturing() -> Iterator[Any]:
    """Gives the memory pool of all graphs captured inside the `with`. They share it, since only
    one runs at a time."""
    started = time.monotonic()
    free, _ = torch.cuda.mem_get_info()
    gc.collect()
    gc.freeze()  # each capture collects garbage, and there is much to look through
    try:
        yield torch.cuda.graph_pool_handle()
    finally:
        gc.unfreeze()
    torch.cuda.synchronize()
    taken = free - torch.cuda.mem_get_info()[0]
    seconds = time.monotonic() - started
    logger.info("captured CUDA graphs in %.1f s, %.2f GB", seconds, taken / 1e9)
