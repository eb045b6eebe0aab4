"""Picks the next token of each row: decides which rules this step's rows need, and applies the
formulas of `kernels/` in their fixed order. Runs on rank 0 only.

`sample` launches work on the device and reads nothing back; `Sampled.read` makes the answer once
its tensors are on the host. A batch is flat: `rows` may name a request several times, with the
output position of each, as verifying drafts does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.sampling import sampling
from ...kernels.sampling.noise import uniform
from ...shared.messages import TokenLogprob
from ..memory.device import to_device
from ..rows import RowTable
from .rules import Biases, Choice, RowRules

_LEAST_LOGPROB = -9999.0  # stands for -inf, which JSON cannot say
_MOST_BOOST = 1e30  # exponential length penalty: keeps logits finite however long the text is
_SEGMENT = 32  # rows whose logits are copied at one time: 20 MB each copy at 154,880 ids


Masks = tuple[Sequence[int], Tensor]  # of grammars: places in the batch, [places, words] int32
Logprobs = tuple[Tensor, Tensor, Tensor, Tensor]  # see `sampling.logprobs`


@dataclass(frozen=True)
class Sampled:
    """What a step sampled, on the device."""

    rows: Sequence[int]
    ids: Tensor  # [len(rows)] int64
    peaks: Tensor  # [len(rows)] float32, the largest logit of each row; NaN if any is
    places: Sequence[int] = ()  # of the rows that want log-probabilities
    num_top: Sequence[int] = ()  # how many of the likeliest, parallel to places
    logprobs: Sequence[Tensor] = ()  # as `sampling.logprobs` gives them

    def tensors(self) -> list[Tensor]:
        """What `read` needs on the host."""
        return [self.ids, self.peaks, *self.logprobs]

    def read(self, host: Sequence[Tensor]) -> tuple[list[int], list[list[TokenLogprob]]]:
        """Copies of `tensors()` on the host -> (token ids, log-probabilities parallel to rows, an
        empty list where not asked for). Raises FloatingPointError naming the first row whose
        logits were not finite numbers."""
        ids, peaks, *logprobs = host
        if not bool(peaks.isfinite().all()):
            pairs = zip(self.rows, peaks.tolist(), strict=True)
            bad = [row for row, peak in pairs if not abs(peak) < torch.inf]
            raise FloatingPointError(
                f"logits of row {bad[0]} are not finite ({len(bad)} rows are bad)"
            )
        found: list[list[TokenLogprob]] = [[] for _ in self.rows]
        if logprobs:
            own, rank, top_ids, top = logprobs
            entries = read_logprobs(ids[self.places], (own, rank, top_ids, top), self.num_top)
            for place, entry in zip(self.places, entries, strict=True):
                found[place] = [entry]
        return ids.tolist(), found


def sample(
    raw: Tensor,
    rows: Sequence[int],
    table: RowTable,
    num_token_ids: int,
    masks: Masks | None = None,
    index: Tensor | None = None,
    positions: Tensor | None = None,
    drafts: Tensor | None = None,
) -> Sampled:
    """Launch the choice of a token for each row of `raw` logits [len(rows), vocab] float32, which
    it may change. Ids >= `num_token_ids` are padding.

    On the device, int64: `index` is `rows`, `positions` the number of outputs each row had before
    this token (both from the row table, if left out), drafts [len(rows), k] tokens before this one
    that penalties count although they were not recorded (ids < 0: none). Rows with a grammar sample
    what their mask allows, before anything else that they asked for.
    """
    if index is None or positions is None:
        outputs = [table.num_outputs[row] for row in rows]
        index, positions = to_device([rows, outputs], torch.int64, raw.device)
    rules, peaks = table.rules, None
    if rules.touch_logits(rows) or (masks is not None and masks[0]):
        peaks = raw.amax(-1)  # before bans hide what is not finite
        _apply_rules(raw, rows, table, num_token_ids, masks, index, positions, drafts)
    logits = raw[:, :num_token_ids]
    ids, found = choose(rules.choice(rows), logits, index, positions, table.scalars)
    places = [place for place, row in enumerate(rows) if row in rules.logprobs]
    num_top = [rules.logprobs[rows[place]] for place in places]
    logprobs = _logprobs(logits, places, ids, index, table.scalars, num_top) if places else ()
    return Sampled(rows, ids, found if peaks is None else peaks, places, num_top, logprobs)


def choose(
    choice: Choice, logits: Tensor, index: Tensor, positions: Tensor, scalars: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """(ids int64, largest logits float32) [n] of logits [n, ids]. Depends on nothing but its
    arguments, so it can be captured, once for each choice."""
    if choice is Choice.GREEDY:
        return sampling.greedy(logits)
    noise = uniform(scalars["seed"], positions, index)
    temperature = scalars["temperature"]
    if choice is Choice.DRAW:
        return sampling.draw(logits, noise, index, temperature)
    top_k, top_p, min_p = (scalars[name] for name in ("top_k", "top_p", "min_p"))
    return sampling.draw_truncated(logits, noise, index, temperature, top_k, top_p, min_p)


def token_logprobs(logits: Tensor, ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprob]:
    """What a client sees about ids [n] under softmax(logits [n, vocab]), with the `num_top[i]`
    likeliest tokens. Waits for the device."""
    ones = torch.ones_like(ids, dtype=torch.float32)
    found = sampling.logprobs(logits, ids, ones, max(num_top, default=0))
    return read_logprobs(ids, found, num_top)


def read_logprobs(ids: Tensor, found: Logprobs, num_top: Sequence[int]) -> list[TokenLogprob]:
    """The same from what `sampling.logprobs` found about ids [n]."""
    own, ranks, top_ids, top = found
    own, top = own.clamp(min=_LEAST_LOGPROB), top.clamp(min=_LEAST_LOGPROB)
    columns = (ids.tolist(), own.tolist(), ranks.tolist(), top_ids.tolist(), top.tolist(), num_top)
    return [
        TokenLogprob(token_id, logprob, rank, list(zip(likely[:k], values[:k], strict=True)))
        for token_id, logprob, rank, likely, values, k in zip(*columns, strict=True)
    ]


def _logprobs(
    logits: Tensor,
    places: list[int],
    ids: Tensor,
    index: Tensor,
    scalars: dict[str, Tensor],
    num_top: list[int],
) -> list[Tensor]:
    """`sampling.logprobs` of the rows at `places`, copied some at a time unless they are all."""
    temperature = scalars["temperature"][index]
    if len(places) == len(ids):
        return list(sampling.logprobs(logits, ids, temperature, max(num_top)))
    parts = [
        sampling.logprobs(logits[at], ids[at], temperature[at], max(num_top))
        for at in to_device(places, torch.int64, logits.device).split(_SEGMENT)
    ]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _apply_rules(
    raw: Tensor,
    rows: Sequence[int],
    table: RowTable,
    num_token_ids: int,
    masks: Masks | None,
    index: Tensor,
    positions: Tensor,
    drafts: Tensor | None,
) -> None:
    """Penalties, stop-token rules, bias, allow lists and grammars, for the rows that have any."""
    rules = table.rules
    if rules.penalties.concerns(rows):
        rules.penalties.penalise(raw, index, table.scalars, drafts)
    _boost(raw, rows, rules, positions)
    grammars = dict(zip(masks[0], range(len(masks[0])), strict=True)) if masks else {}
    # Where rules together may forbid everything, which depends on how many outputs there are.
    masked = [
        place
        for place, row in enumerate(rows)
        if place in grammars or row in rules.allowed or rules.can_ban(row, num_token_ids)
    ]
    free = sorted(set(range(len(rows))).difference(masked))
    _add_biases(raw, free, free, rows, table, positions)
    for begin in range(0, len(masked), _SEGMENT):
        places = masked[begin : begin + _SEGMENT]
        at = to_device(places, torch.int64, raw.device)
        before = raw[at]
        after = before.clone()
        _add_biases(after, range(len(places)), places, rows, table, positions)
        allowing = [i for i, place in enumerate(places) if rows[place] in rules.allowed]
        if allowing:
            allowed = torch.stack([rules.allowed[rows[places[i]]] for i in allowing])
            where = to_device(allowing, torch.int64, raw.device)
            sampling.allow_only(after, where, allowed)
        following = [i for i, place in enumerate(places) if place in grammars]
        if following and masks is not None:
            words = masks[1][[grammars[places[i]] for i in following]]
            legal = sampling.unpack_bits(_upload(words, raw.device), raw.shape[1])
            where = to_device(following, torch.int64, raw.device)
            sampling.allow_only(after, where, legal)
            sampling.allow_only(before, where, legal)
        # Rules that together forbid everything (a client's contradiction, or a grammar that leaves
        # no other way) are void, except for the grammar.
        void = after[:, :num_token_ids].amax(-1, keepdim=True) == -torch.inf
        raw[at] = torch.where(void, before, after)


def _upload(words: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting."""
    return words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words


def _boost(logits: Tensor, rows: Sequence[int], rules: RowRules, positions: Tensor) -> None:
    """logit += abs(logit) * (factor ** steps - 1) for stop tokens, `steps` tokens after the start:
    raises them as a text grows long."""
    boosts = [(place, rules.boosts[row]) for place, row in enumerate(rows) if row in rules.boosts]
    if not boosts:
        return
    pairs = [(place, i, b.start, b.factor) for place, b in boosts for i in b.ids]
    places, ids, starts, factors = zip(*pairs, strict=True)
    at = to_device([places, ids, starts], torch.int64, logits.device)
    factor = to_device(factors, torch.float64, logits.device)
    steps = (positions[at[0]] - at[2]).clamp(min=0)
    grown = (factor**steps - 1).clamp(max=_MOST_BOOST).float()
    old = logits[at[0], at[1]]
    logits[at[0], at[1]] = old + old.abs() * grown


def _add_biases(
    logits: Tensor,
    targets: Sequence[int],
    places: Sequence[int],
    rows: Sequence[int],
    table: RowTable,
    positions: Tensor,
) -> None:
    """logit += bias for the rows at `places` of the batch, which are `targets` of `logits`."""
    biases = table.rules.biases
    pairs = [
        (target, place, i, least, value)
        for target, place in zip(targets, places, strict=True)
        if rows[place] in biases
        for i, least, value in _changes(biases[rows[place]], table.num_outputs[rows[place]])
    ]
    if not pairs:
        return
    *integers, values = zip(*pairs, strict=True)
    at = to_device(integers, torch.int64, logits.device)
    value = to_device(values, torch.float32, logits.device)
    value = value.masked_fill(positions[at[1]] < at[3], -torch.inf)
    logits[at[0], at[2]] = logits[at[0], at[2]] + value


def _changes(biases: Biases, num_outputs: int) -> list[tuple[int, int, float]]:
    """(id, outputs before which it is banned, bias) where there is anything to do for a row that
    has at least `num_outputs`."""
    columns = zip(biases.ids, biases.min_outputs, biases.values, strict=True)
    return [change for change in columns if change[2] or num_outputs < change[1]]
