"""Picks the next token of each row: decides which rules this step's rows need, and applies the
formulas of `kernels/` in their fixed order. Runs on rank 0 only.

`sample` launches work on the device and reads nothing back; `Sampled.read` makes the answer once
its tensors are on the host. A batch is flat: with drafts a row has several sampling points in it,
each with an output position of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.sampling import sampling
from ...shared.messages import TokenLogprob
from ..inputs import SamplingPoints
from ..memory.device import to_device
from ..rows import RowTable
from .logprobs import read_logprobs
from .rules import Biases, RowRules, SamplingMode

_MOST_BOOST = 1e30  # exponential length penalty: keeps logits finite however long the text is
_SEGMENT = 32  # points whose logits are copied at a time: 20 MB each copy at 154,880 ids


# Of grammars: sampling points [n], and for each of them a mask [n, words] int32.
Masks = tuple[Sequence[int], Tensor]


@dataclass(frozen=True)
class Sampled:
    """The sampled tokens of a step, on the device."""

    rows: Sequence[int]  # of each sampling point
    ids: Tensor  # [num_points] int64
    peaks: Tensor  # [num_points] float32, the largest logit of each point; NaN if any is
    wanted: Sequence[int] = ()  # points whose row wants log-probabilities
    num_top: Sequence[int] = ()  # how many of the likeliest tokens to name, parallel to wanted
    logprobs: Sequence[Tensor] = ()  # as `sampling.logprobs` gives them

    def tensors(self) -> list[Tensor]:
        """The tensors that `read` needs on the host."""
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
        entries: list[list[TokenLogprob]] = [[] for _ in self.rows]
        if logprobs:
            named = read_logprobs(ids[self.wanted], logprobs, self.num_top)
            for point, entry in zip(self.wanted, named, strict=True):
                entries[point] = [entry]
        return ids.tolist(), entries


def sample(
    raw: Tensor,
    rows: Sequence[int],
    points: SamplingPoints,
    table: RowTable,
    num_token_ids: int,
    masks: Masks | None = None,
) -> Sampled:
    """Launch the choice of a token for each row of `raw` logits [num_points, vocab] float32, which
    may be changed. Ids >= `num_token_ids` are padding.

    `rows` is `points.rows` on the host. Penalties count the drafts before a point as outputs. Rows
    with a grammar sample only tokens that their mask allows, whatever else they asked for.
    """
    rules, peaks = table.rules, None
    if rules.touch_logits(rows) or masks is not None:
        peaks = raw.amax(-1)  # before bans hide values that are not finite
        _apply_rules(raw, rows, points, table, num_token_ids, masks)
    logits = raw[:, :num_token_ids]
    ids, largest = choose(rules.mode(rows), logits, points, table.scalars)
    wanted = [i for i, row in enumerate(rows) if row in rules.logprobs]
    num_top = [rules.logprobs[rows[i]] for i in wanted]
    logprobs = _logprobs(logits, wanted, ids, points, table.scalars, num_top) if wanted else ()
    return Sampled(rows, ids, largest if peaks is None else peaks, wanted, num_top, logprobs)


def choose(
    mode: SamplingMode, logits: Tensor, points: SamplingPoints, scalars: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """(ids int64, largest logits float32) [n] of logits [n, ids]."""
    if mode is SamplingMode.GREEDY:
        return sampling.greedy(logits)
    noise = sampling.uniform(scalars["seed"], points.positions, points.rows)
    temperature = scalars["temperature"]
    if mode is SamplingMode.DRAW:
        return sampling.draw(logits, noise, points.rows, temperature)
    top_k, top_p, min_p = scalars["top_k"], scalars["top_p"], scalars["min_p"]
    return sampling.draw_truncated(logits, noise, points.rows, temperature, top_k, top_p, min_p)


def _logprobs(
    logits: Tensor,
    wanted: list[int],
    ids: Tensor,
    points: SamplingPoints,
    scalars: dict[str, Tensor],
    num_top: list[int],
) -> list[Tensor]:
    """`sampling.logprobs` of the wanted points, copied some at a time unless they are all."""
    temperature = scalars["temperature"][points.rows]
    if len(wanted) == len(ids):
        return list(sampling.logprobs(logits, ids, temperature, max(num_top)))
    parts = [
        sampling.logprobs(logits[at], ids[at], temperature[at], max(num_top))
        for at in to_device(wanted, torch.int64, logits.device).split(_SEGMENT)
    ]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _apply_rules(
    raw: Tensor,
    rows: Sequence[int],
    points: SamplingPoints,
    table: RowTable,
    num_token_ids: int,
    masks: Masks | None,
) -> None:
    """Penalties, stop-token rules, bias, allow lists, grammars and thinking budgets, for the points
    whose rows have any. Changes `raw`."""
    rules = table.rules
    if rules.penalties.concerns(rows):
        rules.penalties.penalise(raw, points.rows, table.scalars, points.drafts)
    positions = points.positions
    _boost(raw, rows, rules, positions)
    grammars = dict(zip(masks[0], range(len(masks[0])), strict=True)) if masks else {}
    # Points whose rules together may ban every token; it depends on the number of outputs.
    masked = [
        point
        for point, row in enumerate(rows)
        if point in grammars or row in rules.allowed or rules.can_ban(row, num_token_ids)
    ]
    free = sorted(set(range(len(rows))).difference(masked))
    _add_biases(raw, free, free, rows, table, positions)
    for begin in range(0, len(masked), _SEGMENT):
        chosen = masked[begin : begin + _SEGMENT]
        at = to_device(chosen, torch.int64, raw.device)
        before = raw[at]
        after = before.clone()
        _add_biases(after, range(len(chosen)), chosen, rows, table, positions)
        allowing = [i for i, point in enumerate(chosen) if rows[point] in rules.allowed]
        if allowing:
            allowed = torch.stack([rules.allowed[rows[chosen[i]]] for i in allowing])
            where = to_device(allowing, torch.int64, raw.device)
            sampling.allow_only(after, where, allowed)
        following = [i for i, point in enumerate(chosen) if point in grammars]
        if following and masks is not None:
            words = masks[1][[grammars[chosen[i]] for i in following]]
            legal = sampling.unpack_bits(_upload(words, raw.device), raw.shape[1])
            where = to_device(following, torch.int64, raw.device)
            sampling.allow_only(after, where, legal)
            sampling.allow_only(before, where, legal)
        # Rules that together ban every token (a client's contradiction, or a grammar that allows
        # only banned tokens) are void, except for the grammar.
        void = after[:, :num_token_ids].amax(-1, keepdim=True) == -torch.inf
        raw[at] = torch.where(void, before, after)
    if rules.thinking.concerns(rows):  # last: no other rule keeps a reasoning going
        rules.thinking.force(raw, *points)


def _upload(words: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting."""
    return words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words


def _boost(logits: Tensor, rows: Sequence[int], rules: RowRules, positions: Tensor) -> None:
    """Make stop tokens likelier as a text grows: logit += abs(logit) * (factor ** steps - 1),
    `steps` tokens after the start."""
    boosts = [(point, rules.boosts[row]) for point, row in enumerate(rows) if row in rules.boosts]
    if not boosts:
        return
    pairs = [(point, i, b.start, b.factor) for point, b in boosts for i in b.ids]
    chosen, ids, starts, factors = zip(*pairs, strict=True)
    at = to_device([chosen, ids, starts], torch.int64, logits.device)
    factor = to_device(factors, torch.float64, logits.device)
    steps = (positions[at[0]] - at[2]).clamp(min=0)
    grown = (factor**steps - 1).clamp(max=_MOST_BOOST).float()
    old = logits[at[0], at[1]]
    logits[at[0], at[1]] = old + old.abs() * grown


def _add_biases(
    logits: Tensor,
    targets: Sequence[int],
    chosen: Sequence[int],
    rows: Sequence[int],
    table: RowTable,
    positions: Tensor,
) -> None:
    """logit += bias of the points `chosen`, which are the rows `targets` of `logits`."""
    biases = table.rules.biases
    pairs = [
        (target, point, i, least, value)
        for target, point in zip(targets, chosen, strict=True)
        if rows[point] in biases
        for i, least, value in _changes(biases[rows[point]], table.min_outputs[rows[point]])
    ]
    if not pairs:
        return
    *integers, values = zip(*pairs, strict=True)
    at = to_device(integers, torch.int64, logits.device)
    value = to_device(values, torch.float32, logits.device)
    value = value.masked_fill(positions[at[1]] < at[3], -torch.inf)
    logits[at[0], at[2]] = logits[at[0], at[2]] + value


def _changes(biases: Biases, min_outputs: int) -> list[tuple[int, int, float]]:
    """(id, number of outputs until which it is banned, bias) of the ids that change for a row with
    at least `min_outputs` outputs."""
    columns = zip(biases.ids, biases.min_outputs, biases.values, strict=True)
    return [change for change in columns if change[2] or min_outputs < change[1]]
