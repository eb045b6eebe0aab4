"""CUDA graphs of the decode step: captured once per batch size, replayed with any rows.

A graph reads row numbers from a fixed buffer and everything else (last tokens, lengths, pages)
from the row table on the device, so a replay needs one small copy. Sampling is not in it: grammar
masks and penalties differ from step to step.
"""

import gc
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..shared.model_spec import ModelSpec
from .inputs import decode_inputs
from .model.glm4_moe_lite import ModelWeights, compute_logits, forward
from .parallel import Ranks
from .rows import RowTable

_SIZES = (1, 2, 4, 8, 12, *range(16, 65, 8), *range(80, 257, 16))
_STEP = 32  # above those


def batch_sizes(largest: int) -> list[int]:
    """Batch sizes to capture, so that little is filled up: ascending, `largest` the last."""
    sizes = [*_SIZES, *range(_SIZES[-1] + _STEP, largest + _STEP, _STEP)]
    return [size for size in sizes if size < largest] + [largest]


class DecodeGraphs:
    """The graphs of one rank. All share one memory pool: only one runs at a time."""

    def __init__(
        self,
        model: ModelWeights,
        table: RowTable,
        kv: Tensor,
        spec: ModelSpec,
        ranks: Ranks,
        largest: int,
    ) -> None:
        self._model, self._table, self._kv = model, table, kv
        self._spec, self._ranks = spec, ranks
        self.sizes = batch_sizes(largest)
        device = table.device
        self._rows = torch.full((largest,), table.scratch_row, dtype=torch.int64, device=device)
        # Graphs write here, or each of them would keep logits of its own.
        self._logits = torch.empty(largest, spec.vocab_size, dtype=torch.float32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._filled: list[int] = []  # row numbers in the buffer

    def capture(self, report: Callable[[int, int], None]) -> float:
        """Capture all sizes, largest first (the smaller ones then fit into its memory).
        `report(done, total)` is called after each. -> seconds."""
        started = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        gc.collect()
        gc.freeze()  # each capture collects garbage, and there is much to look through
        try:
            for done, size in enumerate(reversed(self.sizes)):
                self._step(size)  # compiles and sizes workspaces, which a capture must not
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._step(size)
                self._graphs[size] = graph
                report(done + 1, len(self.sizes))
        finally:
            gc.unfreeze()
        torch.cuda.synchronize()
        return time.monotonic() - started

    def covers(self, num_rows: int) -> bool:
        """Whether a decode step of so many rows has a graph."""
        return bool(self._graphs) and 0 < num_rows <= self.sizes[-1]

    def replay(self, rows: Sequence[int]) -> Tensor:
        """Decode one token of each row, which advances their lengths on the device.
        -> logits [len(rows), vocab] float32, valid until the next replay."""
        size = next(size for size in self.sizes if size >= len(rows))
        wanted = [*rows, *[self._table.scratch_row] * (size - len(rows))]
        if self._filled[:size] != wanted:
            host = torch.tensor(wanted, dtype=torch.int64, pin_memory=True)
            self._rows[:size].copy_(host, non_blocking=True)
            self._filled[:size] = wanted
        self._graphs[size].replay()
        return self._logits[: len(rows)]

    def _step(self, size: int) -> None:
        table = self._table
        rows = self._rows[:size]
        inputs = decode_inputs(rows, table)
        hidden = forward(self._model, inputs, self._kv, self._spec, self._ranks)
        compute_logits(self._model, hidden, self._spec, self._ranks, self._logits[:size])
        table.lengths.index_add_(0, rows, torch.ones_like(rows))
        table.lengths[table.scratch_row :].zero_()
