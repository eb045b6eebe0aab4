"""The sampling rules of each running row, sorted when it is admitted, so that a step finds out with
a few set operations which rules it needs. Nothing here waits for the device.

A row with penalties gets a slot of token counts when it is admitted and gives it back when it is
freed. Slots are allocated when they are needed, in doublings: 310 kB each at 154,880 ids.
"""

import enum
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.sampling import penalties
from ...shared.sampling import SamplingParams
from ..memory.device import to_device
from .thinking import ThinkingBudgets

_FIRST_SLOTS = 8  # of penalty counts


class SamplingMode(enum.Enum):
    """How tokens are chosen from logits. The later ones include the earlier."""

    GREEDY = enum.auto()
    DRAW = enum.auto()
    TRUNCATED = enum.auto()


@dataclass(frozen=True)
class Boost:
    """Stop tokens get likelier with every token after the first `start`."""

    ids: tuple[int, ...]
    start: int
    factor: float


@dataclass(frozen=True)
class Biases:
    """Values added to single logits; -inf bans. ids[i] is also banned until the row has
    `min_outputs[i]` output tokens."""

    ids: tuple[int, ...]
    values: tuple[float, ...]
    min_outputs: tuple[int, ...]


class PenaltyCounts:
    """How often each token occurred in the rows that have penalties. Counts are on the device; the
    slot of each row is on the host too."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device | str) -> None:
        self.slots = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
        self._counts = torch.zeros(0, vocab_size + vocab_size % 2, dtype=torch.int16, device=device)
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []

    def admit(self, row: int, token_ids: Sequence[int]) -> None:
        """The row has penalties, and these tokens occurred before."""
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
        """Count token_ids int64 [n] of the rows `index` int64 [n]; ids < 0 are skipped. `rows`
        names all of them that may have penalties."""
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


class RowRules:
    """Which rows have which rules."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self.penalties = PenaltyCounts(num_rows, vocab_size, device)
        self.thinking = ThinkingBudgets(num_rows, device)
        self.boosts: dict[int, Boost] = {}
        self.biases: dict[int, Biases] = {}
        self.allowed: dict[int, Tensor] = {}  # [vocab] bool on the device
        # How many of the likeliest tokens to name, beside output tokens and prompt tokens.
        self.logprobs: dict[int, int] = {}
        self.prompt_logprobs: dict[int, int] = {}
        self._drawing: set[int] = set()
        self._truncating: set[int] = set()

    def admit(
        self,
        row: int,
        params: SamplingParams,
        counted_ids: Sequence[int] = (),
        output_ids: Sequence[int] = (),
    ) -> None:
        """Replace the row's rules. `counted_ids`: tokens that count for its penalties.
        `output_ids`: its outputs so far, if it has a thinking budget."""
        self.free(row)
        self.thinking.admit(row, params, output_ids)
        if params.temperature > 0:
            self._drawing.add(row)
            if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
                self._truncating.add(row)
        if params.uses_penalties:
            self.penalties.admit(row, counted_ids)
        stops = tuple({t for t in params.stop_token_ids if t < self._vocab_size})
        if stops and params.decay_factor != 1:
            self.boosts[row] = Boost(stops, params.decay_start, params.decay_factor)
        if params.logit_bias or params.min_new_tokens > 0:
            biases = _collect_biases(params, stops, self._vocab_size)
            if biases.ids:
                self.biases[row] = biases
        if params.allowed_token_ids:
            ids = to_device(params.allowed_token_ids, torch.int64, self._device)
            allowed = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
            self.allowed[row] = allowed.index_fill_(0, ids, True)
        if params.num_logprobs >= 0:
            self.logprobs[row] = params.num_logprobs
        if params.num_prompt_logprobs >= 0:
            self.prompt_logprobs[row] = params.num_prompt_logprobs

    def free(self, row: int) -> None:
        """Drop the row's rules."""
        for rules in (self.boosts, self.biases, self.allowed, self.logprobs, self.prompt_logprobs):
            rules.pop(row, None)
        self._drawing.discard(row)
        self._truncating.discard(row)
        self.penalties.free(row)
        self.thinking.free(row)

    def mode(self, rows: Sequence[int]) -> SamplingMode:
        """The least mode that serves all of the rows."""
        if self._drawing.isdisjoint(rows):
            return SamplingMode.GREEDY
        return SamplingMode.DRAW if self._truncating.isdisjoint(rows) else SamplingMode.TRUNCATED

    def can_ban(self, row: int, num_token_ids: int) -> bool:
        """Whether the row's biases may ban every token."""
        return row in self.biases and len(self.biases[row].ids) >= num_token_ids

    def touch_logits(self, rows: Sequence[int]) -> bool:
        """Whether any of the rows has rules that change its logits (grammars aside)."""
        if self.penalties.concerns(rows) or self.thinking.concerns(rows):
            return True
        changing = (self.boosts, self.biases, self.allowed)
        return not all(rules.keys().isdisjoint(rows) for rules in changing)


def _collect_biases(params: SamplingParams, stops: tuple[int, ...], vocab_size: int) -> Biases:
    values: dict[int, float] = defaultdict(float)
    for token_id, bias in params.logit_bias:
        if token_id < vocab_size:
            values[token_id] += -torch.inf if bias <= -100 else bias
    min_outputs = dict.fromkeys(values, 0)
    if params.min_new_tokens > 0:
        min_outputs |= dict.fromkeys(stops, params.min_new_tokens)
    ids = tuple(min_outputs)
    return Biases(ids, tuple(values[i] for i in ids), tuple(min_outputs.values()))
