"""What each running row asks of the sampler, sorted at its admission so that a step learns what it
needs from a few set operations, and waits for nothing."""

import enum
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...shared.sampling import SamplingParams
from ..memory.device import to_device
from .penalties import PenaltyCounts


class Choice(enum.Enum):
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
    """What is added to single logits; -inf bans. Before `min_outputs[i]` tokens came, ids[i] is
    banned as well."""

    ids: tuple[int, ...]
    values: tuple[float, ...]
    min_outputs: tuple[int, ...]


class RowRules:
    """The rows by what they ask for."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self.penalties = PenaltyCounts(num_rows, vocab_size, device)
        self.boosts: dict[int, Boost] = {}
        self.biases: dict[int, Biases] = {}
        self.allowed: dict[int, Tensor] = {}  # [vocab] bool on the device
        self.logprobs: dict[int, int] = {}  # how many of the likeliest tokens to name
        self._drawing: set[int] = set()
        self._truncating: set[int] = set()

    def admit(self, row: int, params: SamplingParams, counted_ids: Sequence[int]) -> None:
        """The row begins anew. `counted_ids`: tokens that count for its penalties."""
        self.free(row)
        if params.temperature > 0:
            self._drawing.add(row)
            if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
                self._truncating.add(row)
        if params.uses_penalties:
            self.penalties.admit(row, counted_ids)
        stops = tuple({t for t in params.stop_token_ids if t < self._vocab_size})
        if stops and params.decay_factor != 1:
            self.boosts[row] = Boost(stops, params.decay_start, params.decay_factor)
        biases = _collect_biases(params, stops, self._vocab_size)
        if biases.ids:
            self.biases[row] = biases
        if params.allowed_token_ids:
            ids = to_device(params.allowed_token_ids, torch.int64, self._device)
            allowed = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
            self.allowed[row] = allowed.index_fill_(0, ids, True)
        if params.num_logprobs >= 0:
            self.logprobs[row] = params.num_logprobs

    def free(self, row: int) -> None:
        """The row asks for nothing."""
        for rules in (self.boosts, self.biases, self.allowed, self.logprobs):
            rules.pop(row, None)
        self._drawing.discard(row)
        self._truncating.discard(row)
        self.penalties.free(row)

    def choice(self, rows: Sequence[int]) -> Choice:
        """The least that serves all of the rows."""
        if self._drawing.isdisjoint(rows):
            return Choice.GREEDY
        return Choice.DRAW if self._truncating.isdisjoint(rows) else Choice.TRUNCATED

    def can_ban(self, row: int, num_token_ids: int) -> bool:
        """Whether the row's biases may ban every token."""
        return row in self.biases and len(self.biases[row].ids) >= num_token_ids

    def touch_logits(self, rows: Sequence[int]) -> bool:
        """Whether any of the rows has more than a way to choose (grammars aside)."""
        changing = (self.boosts, self.biases, self.allowed)
        return self.penalties.concerns(rows) or not all(
            rules.keys().isdisjoint(rows) for rules in changing
        )


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
