"""CUDA graphs of decode steps: captured once per batch size and draft length, replayed with any
rows.

A graph reads row numbers from a fixed buffer and everything else (last tokens, drafts, lengths,
pages) from the rows' state on the device, so a replay needs one small copy. Sampling is not in it:
grammar masks and penalties differ from step to step. With drafts a step therefore has two graphs,
before and after sampling.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..shared.messages import MAX_DRAFT_TOKENS
from .mtp import Places

_SIZES = (1, 2, 4, 8, 12, *range(16, 65, 8), *range(80, 257, 16))
_STEP = 32  # above those
_DRAFT_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)  # times draft lengths

# rows [n] int64, number of drafts, logits [n * (drafts + 1), vocab] float32 to fill: run what
# comes before sampling. Without drafts it moves the rows on as well and there are no places.
Verify = Callable[[Tensor, int, Tensor], tuple[Tensor, Places] | None]
# rows [n], number of drafts, sampled [n * (drafts + 1)] int64, hidden states of these: the rest.
# -> number of new tokens [n] int64
Finish = Callable[[Tensor, int, Tensor, Tensor], Tensor]


def batch_sizes(largest: int, num_drafts: int = 0) -> list[int]:
    """Batch sizes to capture, so that little is filled up: ascending."""
    sizes = [*_SIZES, *range(_SIZES[-1] + _STEP, largest + _STEP, _STEP)]
    if num_drafts:
        largest = min(largest, MAX_DRAFT_TOKENS // (num_drafts + 1))
        sizes = list(_DRAFT_SIZES)
    return [size for size in sizes if size < largest] + [largest]


class DecodeGraphs:
    """The graphs of one rank's decode steps."""

    def __init__(
        self,
        verify: Verify,
        finish: Finish | None,
        scratch_row: int,
        vocab_size: int,
        largest: int,
        most_drafts: int,
        device: torch.device,
    ) -> None:
        self._verify, self._finish = verify, finish
        self._scratch_row = scratch_row
        self.sizes = {k: batch_sizes(largest, k) for k in range(most_drafts + 1)}
        tokens = max(sizes[-1] * (k + 1) for k, sizes in self.sizes.items())
        self._rows = torch.full((largest,), scratch_row, dtype=torch.int64, device=device)
        # Graphs write here, or each of them would keep logits of its own.
        self._logits = torch.empty(tokens, vocab_size, dtype=torch.float32, device=device)
        self._sampled = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._before: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._after: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._outputs: dict[tuple[int, int], tuple[Tensor, Places] | None] = {}
        self._num_tokens: dict[tuple[int, int], Tensor] = {}
        self._filled: list[int] = []  # row numbers in the buffer

    @property
    def num_steps(self) -> int:
        """How many kinds of steps there are graphs for."""
        return sum(map(len, self.sizes.values()))

    def run_largest(self) -> None:
        """The largest steps without graphs, for nobody: to measure what they need."""
        for num_drafts, sizes in self.sizes.items():
            self._run(sizes[-1], num_drafts)

    def capture(self, pool: Any, report: Callable[[int, int], None]) -> None:
        """Capture all, largest first (the smaller ones then fit into its memory).
        `report(done, total)` is called after each."""
        self._pool = pool
        keys = [(size, k) for k, sizes in self.sizes.items() for size in sizes]
        keys.sort(key=lambda key: key[0] * (key[1] + 1), reverse=True)
        for done, key in enumerate(keys):
            self._run(*key)  # compiles and sizes workspaces, which a capture must not
            torch.cuda.synchronize()
            self._capture(*key)
            report(done + 1, len(keys))

    def covers(self, num_rows: int, num_drafts: int = 0) -> bool:
        """Whether a decode step of so many rows, with so many drafts each, has graphs."""
        sizes = self.sizes.get(num_drafts, [0])
        return bool(self._before) and 0 < num_rows <= sizes[-1]

    def filled_up(self, rows: Sequence[int]) -> list[int]:
        """The rows that `replay` of these would run: the scratch row fills the batch up."""
        return [*rows, *[self._scratch_row] * (self._key(len(rows), 0)[0] - len(rows))]

    def replay(self, rows: Sequence[int]) -> Tensor:
        """Decode one token of each row, which advances their lengths on the device.
        -> logits [len(rows), vocab] float32, valid until the next replay."""
        self._before[self._fill(rows, 0)].replay()
        return self._logits[: len(rows)]

    def verify(self, rows: Sequence[int], num_drafts: int) -> tuple[Tensor, Places]:
        """The part of a step with drafts before sampling. -> logits and places of all verify
        places [len(rows) * (num_drafts + 1)], valid until the next replay."""
        key = self._fill(rows, num_drafts)
        self._before[key].replay()
        count = len(rows) * (num_drafts + 1)
        outputs = self._outputs[key]
        assert outputs is not None, "captured without drafts"
        return self._logits[:count], Places(*(part[:count] for part in outputs[1]))

    def finish(self, num_rows: int, num_drafts: int, ids: Tensor) -> Tensor:
        """The part after it, of the same step; ids int64 [num_rows * (num_drafts + 1)] were
        sampled. -> number of new tokens [num_rows], valid until the next replay."""
        key = self._key(num_rows, num_drafts)
        self._sampled[: len(ids)] = ids
        self._after[key].replay()
        return self._num_tokens[key][:num_rows]

    def _key(self, num_rows: int, num_drafts: int) -> tuple[int, int]:
        return next(size for size in self.sizes[num_drafts] if size >= num_rows), num_drafts

    def _fill(self, rows: Sequence[int], num_drafts: int) -> tuple[int, int]:
        key = self._key(len(rows), num_drafts)
        wanted = [*rows, *[self._scratch_row] * (key[0] - len(rows))]
        if self._filled[: key[0]] != wanted:
            host = torch.tensor(wanted, dtype=torch.int64, pin_memory=True)
            self._rows[: key[0]].copy_(host, non_blocking=True)
            self._filled[: key[0]] = wanted
        return key

    def _run(self, size: int, num_drafts: int) -> None:
        tokens = size * (num_drafts + 1)
        rows = self._rows[:size]
        outputs = self._verify(rows, num_drafts, self._logits[:tokens])
        if self._finish is not None and outputs is not None:
            self._finish(rows, num_drafts, self._sampled[:tokens], outputs[0])

    def _capture(self, size: int, num_drafts: int) -> None:
        key, tokens = (size, num_drafts), size * (num_drafts + 1)
        rows = self._rows[:size]
        self._before[key] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._before[key], pool=self._pool):
            outputs = self._verify(rows, num_drafts, self._logits[:tokens])
        self._outputs[key] = outputs
        if self._finish is None or outputs is None:
            return
        self._after[key] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._after[key], pool=self._pool):
            found = self._finish(rows, num_drafts, self._sampled[:tokens], outputs[0])
        self._num_tokens[key] = found
