"""State of the running rows between steps, on the device; changed by plans and sampled tokens.

The host keeps its own count of tokens, pages and outputs, so it never asks the device. Bytes of
the KV pages are in `kv_cache.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shared.messages import RowAdmit, StepPlan
from ..shared.sampling import SamplingParams
from .memory.device import to_device
from .sampling.rules import RowRules

_NO_PARAMS = SamplingParams(max_new_tokens=1)
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

    Behind the rows is one more, `scratch_row`, which stands for nobody: CUDA graphs run batches
    of fixed sizes, and what is missing is filled up with it. Its page belongs to no request.
    """

    def __init__(
        self,
        num_rows: int,
        pages_per_row: int,
        page_size: int,
        vocab_size: int,
        device: str,
        scratch_page: int = 0,
    ) -> None:
        self.page_size = page_size
        self.scratch_row = num_rows
        self.device = torch.device(device)
        total = num_rows + 1
        self.last_token = torch.zeros(total, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(total, dtype=torch.int64, device=device)  # tokens with KV
        # Only steps with drafts read these two: tokens sampled so far, tokens that the pages hold.
        self.outputs_made = torch.zeros(total, dtype=torch.int64, device=device)
        self.capacity = torch.zeros(total, dtype=torch.int64, device=device)
        self.capacity[-1] = page_size
        self.page_table = torch.zeros(total, pages_per_row, dtype=torch.int32, device=device)
        self.page_table[-1] = scratch_page
        self._floats = torch.zeros(len(_FLOATS), total, dtype=torch.float32, device=device)
        self._ints = torch.zeros(len(_INTS), total, dtype=torch.int64, device=device)
        # field of SamplingParams -> its column [rows]
        self.scalars = dict(zip(_FLOATS, self._floats, strict=True))
        self.scalars |= dict(zip(_INTS, self._ints, strict=True))
        self.rules = RowRules(total, vocab_size, self.device)
        # Host side. `last_hidden` carries a prompt's last state to its next chunk, for the
        # log-probability of that chunk's first token; empty unless a request asked for those.
        self.params = [_NO_PARAMS] * num_rows
        self.num_tokens = [0] * num_rows
        self.num_pages = [0] * num_rows
        self.num_outputs = [0] * num_rows
        self.last_hidden: dict[int, Tensor] = {}

    def apply(self, plan: StepPlan) -> None:
        """Rows freed, admitted, pages appended, in this order."""
        for row in plan.freed:
            self.num_pages[row] = 0  # a later step that uses the row by mistake is refused
            self.last_hidden.pop(row, None)
            self.rules.free(row)
        if plan.admitted:
            self._admit(plan.admitted)
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
        both = to_device([rows, counts], torch.int64, self.device)
        self.lengths.index_add_(0, both[0], both[1])
        self.count(rows, counts)

    def count(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """The host's half of `advance`, for a step that moves the device's lengths itself."""
        for row, count in zip(rows, counts, strict=True):
            self.num_tokens[row] += count

    def record(self, rows: Sequence[int], token_ids: Tensor) -> None:
        """token_ids [len(rows)] were sampled: next inputs, and counted where penalties ask."""
        index = to_device(rows, torch.int64, self.device)
        self.last_token[index] = token_ids
        self.expect_outputs(rows)
        self.rules.penalties.record(rows, index, token_ids)

    def expect_outputs(self, rows: Sequence[int]) -> None:
        """At least one token is sampled for each of these rows: with drafts the host's count of
        outputs is a lower bound."""
        for row in rows:
            self.num_outputs[row] += 1

    def _admit(self, admits: Sequence[RowAdmit]) -> None:
        rows = [admit.row for admit in admits]
        index = to_device(rows, torch.int64, self.device)
        for admit in admits:
            self._admit_on_host(admit)
        counts = [[a.num_cached_tokens for a in admits], [a.num_output_tokens for a in admits]]
        cached, outputs = to_device(counts, torch.int64, self.device)
        self.lengths[index] = cached
        self.outputs_made[index] = outputs
        params = [admit.sampling for admit in admits]
        floats = [[getattr(p, name) for p in params] for name in _FLOATS]
        self._floats[:, index] = to_device(floats, torch.float32, self.device)
        ints = [[p.top_k for p in params], [p.seed & (1 << 63) - 1 for p in params]]
        self._ints[:, index] = to_device(ints, torch.int64, self.device)
        self._append_pages([(admit.row, admit.pages) for admit in admits])

    def _admit_on_host(self, admit: RowAdmit) -> None:
        row, params = admit.row, admit.sampling
        self.params[row] = params
        self.num_tokens[row] = admit.num_cached_tokens
        self.num_outputs[row] = admit.num_output_tokens
        self.num_pages[row] = 0
        self.last_hidden.pop(row, None)
        self.rules.admit(row, params, admit.counted_ids)

    def _append_pages(self, parts: list[tuple[int, list[int]]]) -> None:
        rows: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        for row, new_pages in parts:
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
