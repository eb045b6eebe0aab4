"""State of the running rows between steps, on the device; changed by plans and sampled tokens.

The host keeps its own count of tokens, pages and outputs, so it never asks the device. The bytes
of the KV pages are in `memory/kv_cache.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shared.messages import PagesAppended, RowAdmit, StepPlan
from .memory.device import to_device
from .sampling.rules import RowRules

_FLOATS = (  # fields of SamplingParams that have a column on the device
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_INTS = ("top_k", "seed")


class RowTable:
    """Everything a step needs to know about its rows, indexed by row number.

    The last row, `scratch_row`, belongs to no request: CUDA graphs run batches of fixed sizes, and
    smaller batches are padded with it. Its page belongs to no request either.

    With drafts the host knows only a lower bound of a row's tokens and outputs. A row may then be
    planned once too often, up to 2 * max_drafts positions past its pages: `page_table` has columns
    for them, and their KV goes to the scratch page.
    """

    def __init__(
        self,
        num_rows: int,
        pages_per_row: int,
        page_size: int,
        vocab_size: int,
        device: str,
        max_drafts: int = 0,
    ) -> None:
        self.page_size = page_size
        self.scratch_row = num_rows
        self.device = torch.device(device)
        self.max_drafts = max_drafts
        total = num_rows + 1

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._counts = zeros(2, total)
        self.lengths, self.num_outputs = self._counts  # tokens with KV; tokens sampled
        self.ones = torch.ones_like(self._counts)  # one token and one output more, for `advance`
        self.last_token = zeros(total)  # it has no KV yet
        # Guesses of the tokens after the last one; any token ids until drafts are made.
        self.drafts = zeros(total, max_drafts)
        self.capacity = zeros(total)  # tokens that the row's pages hold
        self.capacity[-1] = page_size
        columns = pages_per_row + -(-2 * max_drafts // page_size)
        self.page_table = zeros(total, columns, dtype=torch.int32)
        self._floats = zeros(len(_FLOATS), total, dtype=torch.float32)
        self._ints = zeros(len(_INTS), total)
        # field of SamplingParams -> its column [rows]
        self.scalars = dict(zip(_FLOATS, self._floats, strict=True))
        self.scalars |= dict(zip(_INTS, self._ints, strict=True))
        self.rules = RowRules(total, vocab_size, self.device)
        # Host side. `last_hidden` carries a prompt's last state to its next chunk, for the
        # log-probability of that chunk's first token; empty unless a request asked for those.
        self.num_pages = [0] * num_rows
        self.min_tokens = [0] * num_rows  # exact without drafts
        self.min_outputs = [0] * num_rows  # exact without drafts
        self.last_hidden: dict[int, Tensor] = {}
        self.set_scratch_page(0)

    def set_scratch_page(self, page: int) -> None:
        """The page of padding and of positions past a row's pages."""
        self.scratch_slot = page * self.page_size
        self.page_table[self.scratch_row] = page

    def apply(self, plan: StepPlan) -> None:
        """Rows freed, admitted, pages appended, in this order."""
        for row in plan.freed:
            self.num_pages[row] = 0  # a later step that uses the row by mistake is refused
            self.last_hidden.pop(row, None)
            self.rules.free(row)
        if plan.admitted:
            self._admit(plan.admitted)
        self._append_pages([*plan.admitted, *plan.appended])

    def check_room(self, row: int, num_new: int) -> None:
        """Raises ValueError unless the row's pages hold `num_new` more tokens."""
        needed = self.min_tokens[row] + num_new
        if num_new < 1 or needed > self.num_pages[row] * self.page_size:
            raise ValueError(
                f"row {row}: {num_new} new tokens make {needed}, "
                f"but it has {self.num_pages[row]} pages of {self.page_size}"
            )

    def advance(self, rows: Tensor, added: Tensor) -> None:
        """On the device: added [2, n] int64 tokens with KV and outputs more for rows [n] int64."""
        self._counts.index_add_(1, rows, added)

    def count(self, plan: StepPlan) -> None:
        """Update the host's lower bounds: the tokens and outputs that each row of the plan has at
        least after the step."""
        for chunk in plan.prefill:
            self.min_tokens[chunk.row] += len(chunk.token_ids)
            self.min_outputs[chunk.row] += chunk.sample
        for row in plan.decode:
            self.min_tokens[row] += 1
            self.min_outputs[row] += 1

    def _admit(self, admits: Sequence[RowAdmit]) -> None:
        for admit in admits:
            row = admit.row
            self.min_tokens[row] = admit.num_cached_tokens
            self.min_outputs[row] = admit.num_output_tokens
            self.num_pages[row] = 0
            self.last_hidden.pop(row, None)
            self.rules.admit(row, admit.sampling, admit.counted_ids, admit.output_ids)
        params = [admit.sampling for admit in admits]
        ints = [
            [admit.row for admit in admits],
            [admit.num_cached_tokens for admit in admits],
            [admit.num_output_tokens for admit in admits],
            [p.top_k for p in params],
            [p.seed & (1 << 63) - 1 for p in params],
        ]
        packed = to_device(ints, torch.int64, self.device)
        floats = [[getattr(p, name) for p in params] for name in _FLOATS]
        rows = packed[0]
        self._counts[:, rows] = packed[1:3]
        self._ints[:, rows] = packed[3:]
        self._floats[:, rows] = to_device(floats, torch.float32, self.device)

    def _append_pages(self, parts: Sequence[RowAdmit | PagesAppended]) -> None:
        rows: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        for part in parts:
            row, new_pages = part.row, part.pages
            begin = self.num_pages[row]
            end = self.num_pages[row] = begin + len(new_pages)
            if end > self.page_table.shape[1]:
                raise IndexError(f"row {row}: {end} pages of {self.page_table.shape[1]}")
            rows += [row] * len(new_pages)
            columns += range(begin, end)
            pages += new_pages
        if pages:
            held = [self.num_pages[row] * self.page_size for row in rows]
            at = to_device([rows, columns, pages, held], torch.int64, self.device)
            self.page_table[at[0], at[1]] = at[2].int()
            self.capacity[at[0]] = at[3]
