"""Penalties for tokens that occurred before, and their counts.

counts int16 [num_slots, vocab rounded up to even] has a slot for each row with penalties. slots
int32 [rows of the row table] holds the slot of each row, -1 for none. rows int64 [n] holds the row
of each entry of a batch. Counts stop at `MOST`: beyond, one more makes no noticeable difference.
"""

import torch
from torch import Tensor

MOST = 32_000


def penalise(
    logits: Tensor,
    rows: Tensor,
    slots: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    drafts: Tensor | None = None,
) -> Tensor:
    """Lower the logits of tokens that occurred before, in place; returns `logits`.

    Where count > 0: a positive logit is divided by `repetition`, a negative one multiplied by it;
    then frequency * count and presence are subtracted.

    logits float32 [n, vocab], strided over rows only
    repetition, frequency, presence: float32 columns of the row table
    drafts int64 [n, k], contiguous: tokens that count as well, for this row of logits only; ids < 0
        are ignored
    """
    if logits.is_cuda:
        from .penalties_triton import launch_penalise

        launch_penalise(logits, rows, slots, counts, repetition, frequency, presence, drafts)
        return logits
    slot = slots[rows].long()[:, None]
    times = counts[slot.squeeze(1).clamp(min=0), : logits.shape[1]].int()
    if drafts is not None:
        times.scatter_add_(1, drafts.clamp(min=0), (drafts >= 0).int())
    times = times.masked_fill(slot < 0, 0)
    seen = times > 0
    pushed = logits * repetition[rows][:, None]
    pushed = torch.where(logits > 0, logits / repetition[rows][:, None], pushed)
    pushed = torch.where(seen, pushed, logits)
    lowered = pushed - frequency[rows][:, None] * times - presence[rows][:, None] * seen
    return logits.copy_(lowered)


def count(rows: Tensor, ids: Tensor, slots: Tensor, counts: Tensor) -> None:
    """Count one occurrence of each token ids[i] int64 [n] in row rows[i]. Pairs may repeat. Rows
    without a slot and ids < 0 are ignored."""
    if counts.is_cuda:
        from .penalties_triton import launch_count

        launch_count(rows, ids, slots, counts)
        return
    slot = slots[rows].long()
    counted = (slot >= 0) & (ids >= 0)
    at = (slot.clamp(min=0), ids.clamp(min=0))
    counts.index_put_(at, (counted & (counts[at] < MOST)).short(), accumulate=True)
