"""Penalties for tokens that came before, and the counts of those.

Counts are int16 [num_slots, vocab rounded up to even], a slot for each row that has penalties;
slots int32 [rows of the row table] says which, -1: none. `rows` int64 [n] says whose each row of
a batch is. Counting ends at `MOST`: more of one token make no difference that anybody could see.
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
    """Push down tokens of logits float32 [n, vocab] by how often they came, in place; the columns
    repetition, frequency and presence are indexed by `rows`. drafts int64 [n, k]: tokens that
    count as well for this row of logits alone; ids < 0 are nothing.

    Where count > 0: a positive logit is divided by `repetition`, a negative one multiplied; then
    frequency * count and presence are subtracted.
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
    """Tokens ids int64 [n] came in `rows`; pairs may repeat. Rows without a slot, and ids < 0, are
    passed over."""
    if counts.is_cuda:
        from .penalties_triton import launch_count

        launch_count(rows, ids, slots, counts)
        return
    slot = slots[rows].long()
    counted = (slot >= 0) & (ids >= 0)
    at = (slot.clamp(min=0), ids.clamp(min=0))
    counts.index_put_(at, (counted & (counts[at] < MOST)).short(), accumulate=True)
