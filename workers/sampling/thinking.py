"""Thinking budgets: rows whose reasoning must end after so many tokens.

A row's budget is an output position. If `</think>` has not been sampled before it, it is the only
choice there. Whether it has been is known on the device alone while steps overlap. So the position
lies there, and is moved out of reach by the token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...shared.sampling import SamplingParams

_OUT_OF_REACH = 1 << 40
# A logit that no other one comes near. Not infinite: the softmax of infinity is not a number.
_FORCED = 1e35


class ThinkingBudgets:
    """Where each row must end its reasoning, and with which token. Rows without a budget, or that
    have ended their reasoning, have a position out of reach."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._rows: set[int] = set()
        self._positions = torch.full((num_rows,), _OUT_OF_REACH, device=device)
        self._end_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def admit(self, row: int, params: SamplingParams, output_ids: Sequence[int]) -> None:
        """Set or drop the row's budget. `output_ids`: its outputs so far."""
        self.free(row)
        if params.thinking_budget >= 0 and params.thinking_end_id not in output_ids:
            self._rows.add(row)
            self._positions[row] = params.thinking_budget
            self._end_ids[row] = params.thinking_end_id

    def free(self, row: int) -> None:
        """The row has no budget any more."""
        if row in self._rows:
            self._rows.remove(row)
            self._positions[row] = _OUT_OF_REACH

    def concerns(self, rows: Sequence[int]) -> bool:
        """Whether any of the rows has a budget."""
        return not self._rows.isdisjoint(rows)

    def force(self, logits: Tensor, rows: Tensor, positions: Tensor, drafts: Tensor | None) -> None:
        """Where a budget is used up, leave only the end of the reasoning. Changes `logits`
        [num_points, vocab]; the rest are the fields of `SamplingPoints`."""
        end_ids = self._end_ids[rows][:, None]
        is_due = (positions == self._positions[rows])[:, None]
        if drafts is not None:
            is_due &= (drafts != end_ids).all(1, keepdim=True)
        forced = logits.gather(1, end_ids).masked_fill_(is_due, _FORCED)
        logits.scatter_(1, end_ids, forced)

    def record(self, rows: Tensor, token_ids: Tensor) -> None:
        """These tokens int64 [n] were sampled by `rows` int64 [n]; ids < 0 are skipped."""
        is_open = self._positions[rows] < _OUT_OF_REACH
        has_ended = (token_ids == self._end_ids[rows]) & is_open
        self._positions.index_add_(0, rows, has_ended * _OUT_OF_REACH)
