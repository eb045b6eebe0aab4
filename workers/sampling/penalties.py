"""How often each token came in the rows that have penalties.

A row gets a slot when it is admitted with penalties and gives it back when it is freed. Slots are
allocated when they are needed, in doublings: 310 kB each at 154,880 ids, nothing for the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.sampling import penalties
from ..memory.device import to_device

_FIRST_SLOTS = 8


class PenaltyCounts:
    """Counts on the device; which slot is whose also on the host."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device | str) -> None:
        self.slots = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
        self._counts = torch.zeros(0, vocab_size + vocab_size % 2, dtype=torch.int16, device=device)
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []

    def admit(self, row: int, token_ids: Sequence[int]) -> None:
        """The row has penalties, and these tokens came before."""
        self.free(row)
        if not self._free:
            self._grow()
        slot = self._slot_of[row] = self._free.pop()
        self.slots[row] = slot
        ids = to_device(token_ids, torch.int64, self.slots.device)
        total = torch.zeros(self._counts.shape[1], dtype=torch.int32, device=ids.device)
        total.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        self._counts[slot] = total.clamp_(max=penalties.MOST)

    def free(self, row: int) -> None:
        """The row has no penalties any more."""
        slot = self._slot_of.pop(row, None)
        if slot is not None:
            self.slots[row] = -1
            self._free.append(slot)

    def concerns(self, rows: Sequence[int]) -> bool:
        """Whether any of the rows has penalties."""
        return not self._slot_of.keys().isdisjoint(rows)

    def penalise(
        self,
        logits: Tensor,
        index: Tensor,
        scalars: dict[str, Tensor],
        drafts: Tensor | None = None,
    ) -> None:
        """Lower logits [n, vocab] of the rows `index` int64 [n] in place; see
        `kernels/sampling/penalties.py`."""
        penalties.penalise(
            logits,
            index,
            self.slots,
            self._counts,
            scalars["repetition_penalty"],
            scalars["frequency_penalty"],
            scalars["presence_penalty"],
            drafts,
        )

    def record(self, rows: Sequence[int], index: Tensor, token_ids: Tensor) -> None:
        """token_ids int64 [n] came in the rows `index` int64 [n], of which `rows` is all that
        may have penalties; ids < 0 are nothing."""
        if self.concerns(rows):
            penalties.count(index, token_ids, self.slots, self._counts)

    def of(self, row: int) -> Tensor:
        """The row's counts [vocab] int16."""
        return self._counts[self._slot_of[row]]

    def _grow(self) -> None:
        old = len(self._counts)
        size = (max(2 * old, _FIRST_SLOTS), self._counts.shape[1])
        counts = self._counts.new_empty(size)
        counts[:old] = self._counts
        self._counts = counts
        self._free += range(old, len(counts))
