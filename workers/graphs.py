"""CUDA graphs of the decode step: captured once per batch size, replayed with any rows.

A graph reads row numbers from a fixed buffer and everything else (last tokens, lengths, pages)
from the row table on the device, so a replay needs one small copy. Sampling is not in it: grammar
masks and penalties differ from step to step.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .rows import RowTable

_log = logging.getLogger(__name__)
_SIZES = (1, 2, 4, 8, 12, *range(16, 65, 8), *range(80, 257, 16))
_STEP = 32  # above those


def batch_sizes(largest: int) -> list[int]:
    """Batch sizes to capture, so that little is filled up: ascending, `largest` the last."""
    sizes = [*_SIZES, *range(_SIZES[-1] + _STEP, largest + _STEP, _STEP)]
    return [size for size in sizes if size < largest] + [largest]


# rows [n] int64 on the device, logits [n, vocab] float32: decode one token of each row, put its
# logits there, advance the rows' lengths on the device.
DecodeStep = Callable[[Tensor, Tensor], None]


class DecodeGraphs:
    """The graphs of one rank. All share one memory pool: only one runs at a time."""

    def __init__(self, step: DecodeStep, table: RowTable, vocab_size: int, largest: int) -> None:
        self.sizes = batch_sizes(largest)
        self._step = step
        self._scratch_row = table.scratch_row
        device = table.device
        self._rows = torch.full((largest,), table.scratch_row, dtype=torch.int64, device=device)
        # Graphs write here, or each of them would keep logits of its own.
        self._logits = torch.empty(largest, vocab_size, dtype=torch.float32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._filled: list[int] = []  # row numbers in the buffer

    def run_largest(self) -> None:
        """The largest step without a graph, for nobody: to measure what it needs."""
        self._step(self._rows, self._logits)

    def capture(self, report: Callable[[int, int], None]) -> None:
        """Capture all sizes, largest first (the smaller ones then fit into its memory).
        `report(done, total)` is called after each."""
        started = time.monotonic()
        free, _ = torch.cuda.mem_get_info()
        pool = torch.cuda.graph_pool_handle()
        gc.collect()
        gc.freeze()  # each capture collects garbage, and there is much to look through
        try:
            for done, size in enumerate(reversed(self.sizes)):
                self._run(size)  # compiles and sizes workspaces, which a capture must not
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._run(size)
                self._graphs[size] = graph
                report(done + 1, len(self.sizes))
        finally:
            gc.unfreeze()
        torch.cuda.synchronize()
        taken = free - torch.cuda.mem_get_info()[0]
        seconds = time.monotonic() - started
        _log.info(
            "captured %d CUDA graphs in %.1f s, %.2f GB", len(self.sizes), seconds, taken / 1e9
        )

    def covers(self, num_rows: int) -> bool:
        """Whether a decode step of so many rows has a graph."""
        return bool(self._graphs) and 0 < num_rows <= self.sizes[-1]

    def replay(self, rows: Sequence[int]) -> Tensor:
        """Decode one token of each row, which advances their lengths on the device.
        -> logits [len(rows), vocab] float32, valid until the next replay."""
        size = next(size for size in self.sizes if size >= len(rows))
        wanted = [*rows, *[self._scratch_row] * (size - len(rows))]
        if self._filled[:size] != wanted:
            host = torch.tensor(wanted, dtype=torch.int64, pin_memory=True)
            self._rows[:size].copy_(host, non_blocking=True)
            self._filled[:size] = wanted
        self._graphs[size].replay()
        return self._logits[: len(rows)]

    def _run(self, size: int) -> None:
        self._step(self._rows[:size], self._logits[:size])
