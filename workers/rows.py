"""State of the running rows between steps, on the device; changed by plans and sampled tokens.

The host keeps its own count of tokens, pages and outputs, so it never asks the device. Bytes of
the KV pages are in `kv_cache.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shared.messages import RowAdmit, StepPlan
from ..shared.sampling import SamplingParams

_NO_PARAMS = SamplingParams(max_new_tokens=1)
_SCALARS = {  # field of SamplingParams -> type of its column
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "presence_penalty": torch.float32,
    "frequency_penalty": torch.float32,
    "repetition_penalty": torch.float32,
    "seed": torch.int64,
}


class RowTable:
    """Everything a step needs to know about its rows, indexed by row number."""

    def __init__(
        self, num_rows: int, pages_per_row: int, page_size: int, vocab_size: int, device: str
    ) -> None:
        self.page_size = page_size
        self.last_token = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)  # tokens with KV
        self.page_table = torch.zeros(num_rows, pages_per_row, dtype=torch.int32, device=device)
        self.scalars = {
            name: torch.zeros(num_rows, dtype=dtype, device=device)
            for name, dtype in _SCALARS.items()
        }
        self.counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)
        # Host side. `last_hidden` carries a prompt's last state to its next chunk, for the
        # log-probability of that chunk's first token; empty unless a request asked for those.
        self.params = [_NO_PARAMS] * num_rows
        self.num_tokens = [0] * num_rows
        self.num_pages = [0] * num_rows
        self.num_outputs = [0] * num_rows
        self.last_hidden: dict[int, Tensor] = {}
        # [vocab] bool on the device; rows with `allowed_token_ids` alone
        self.allowed: dict[int, Tensor] = {}

    def apply(self, plan: StepPlan) -> None:
        """Rows freed, admitted, pages appended, in this order."""
        for row in plan.freed:
            self.num_pages[row] = 0  # a later step that uses the row by mistake is refused
            self.last_hidden.pop(row, None)
            self.allowed.pop(row, None)
        for admit in plan.admitted:
            self._admit(admit)
        self._append_pages([(part.row, part.pages) for part in plan.appended])

    def check_room(self, row: int, num_new: int) -> None:
        """Raises ValueError unless the row's pages hold `num_new` more tokens."""
        needed = self.num_tokens[row] + num_new
        if num_new < 1 or needed > self.num_pages[row] * self.page_size:
            raise ValueError(
                f"row {row}: {num_new} new tokens make {needed}, "
                f"but it has {self.num_pages[row]} pages of {self.page_size}"
            )

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """The KV of `counts[i]` more tokens of `rows[i]` has been written."""
        device = self.lengths.device
        self.lengths[torch.tensor(rows, device=device)] += torch.tensor(counts, device=device)
        for row, count in zip(rows, counts, strict=True):
            self.num_tokens[row] += count

    def record(self, rows: Sequence[int], token_ids: Tensor) -> None:
        """token_ids [len(rows)] were sampled: next inputs, and counted where penalties ask."""
        index = torch.tensor(rows, device=self.last_token.device)
        self.last_token[index] = token_ids
        for row in rows:
            self.num_outputs[row] += 1
        counted = [i for i, row in enumerate(rows) if self.params[row].uses_penalties]
        if counted:
            self.counts[index[counted], token_ids[counted]] += 1

    def _admit(self, admit: RowAdmit) -> None:
        row, params = admit.row, admit.sampling
        self.params[row] = params
        self.num_tokens[row] = admit.num_cached_tokens
        self.num_outputs[row] = admit.num_output_tokens
        self.num_pages[row] = 0
        self.last_hidden.pop(row, None)
        self.allowed.pop(row, None)
        if params.allowed_token_ids:
            ids = torch.tensor(params.allowed_token_ids, device=self.counts.device)
            self.allowed[row] = torch.zeros_like(self.counts[row], dtype=torch.bool)
            self.allowed[row][ids] = True
        self.lengths[row] = admit.num_cached_tokens
        for name, column in self.scalars.items():
            value = getattr(params, name)
            column[row] = value & (1 << 63) - 1 if name == "seed" else value
        if params.uses_penalties:
            ids = torch.tensor(admit.counted_ids, dtype=torch.int64, device=self.counts.device)
            self.counts[row] = ids.bincount(minlength=self.counts.shape[1])
        self._append_pages([(row, admit.pages)])

    def _append_pages(self, parts: list[tuple[int, list[int]]]) -> None:
        rows: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        for row, new_pages in parts:
            begin = self.num_pages[row]
            end = self.num_pages[row] = begin + len(new_pages)
            rows += [row] * len(new_pages)
            columns += range(begin, end)
            pages += new_pages
        if pages:
            self.page_table[rows, columns] = torch.tensor(
                pages, dtype=torch.int32, device=self.page_table.device
            )
