"""Picks the next token of each row: decides which rules this step's rows need, and applies the
formulas of `kernels/sampling.py` in their fixed order. Runs on rank 0 only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import sampling
from ..kernels.noise import uniform
from ..shared.messages import TokenLogprob
from ..shared.sampling import SamplingParams
from .rows import RowTable

_LEAST_LOGPROB = -9999.0  # stands for -inf, which JSON cannot say
_MOST_BOOST = 1e30  # exponential length penalty: keeps logits finite however long the text is


Masks = tuple[Sequence[int], Tensor]  # of grammars: places in the batch, [places, words] int32


def sample(
    raw: Tensor,
    rows: Sequence[int],
    table: RowTable,
    num_token_ids: int,
    masks: Masks | None = None,
) -> tuple[Tensor, list[list[TokenLogprob]]]:
    """raw logits [len(rows), vocab] float32 -> (token ids [len(rows)] int64, log-probabilities
    parallel to rows, an empty list where not asked for). Ids >= `num_token_ids` are padding.
    Rows with a grammar sample what their mask allows, before anything else that they asked for.

    Raises FloatingPointError naming the first row whose logits are not finite numbers.
    """
    peaks = raw.amax(-1)  # NaN if any is
    if not bool(peaks.isfinite().all()):
        bad = [row for row, peak in zip(rows, peaks.tolist(), strict=True) if not abs(peak) < 1e38]
        raise FloatingPointError(f"logits of row {bad[0]} are not finite ({len(bad)} rows are bad)")
    params = [table.params[row] for row in rows]
    index = torch.tensor(rows, device=raw.device)
    logits = _apply_rules(raw[:, :num_token_ids], rows, index, params, table, masks)
    wants_logprobs = [i for i, p in enumerate(params) if p.num_logprobs >= 0]
    greedy = [i for i, p in enumerate(params) if p.temperature == 0]
    if len(greedy) == len(rows) and not wants_logprobs:
        return logits.argmax(-1), [[]] * len(rows)
    temperature = table.scalars["temperature"][index]
    logits = logits / temperature.masked_fill(temperature == 0, 1)[:, None]
    ids = _choose(logits, rows, index, params, table)
    logprobs: list[list[TokenLogprob]] = [[] for _ in rows]
    if wants_logprobs:
        num_top = [params[i].num_logprobs for i in wants_logprobs]
        found = token_logprobs(_pick(logits, wants_logprobs), _pick(ids, wants_logprobs), num_top)
        for i, logprob in zip(wants_logprobs, found, strict=True):
            logprobs[i] = [logprob]
    return ids, logprobs


def token_logprobs(logits: Tensor, ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprob]:
    """What a client sees about ids [n] under softmax(logits [n, vocab]), with the `num_top[i]`
    likeliest tokens."""
    own, ranks, top_ids, top = sampling.logprobs(logits, ids, max(num_top, default=0))
    own, top = own.clamp(min=_LEAST_LOGPROB), top.clamp(min=_LEAST_LOGPROB)
    columns = (ids.tolist(), own.tolist(), ranks.tolist(), top_ids.tolist(), top.tolist(), num_top)
    return [
        TokenLogprob(token_id, logprob, rank, list(zip(likely[:k], values[:k], strict=True)))
        for token_id, logprob, rank, likely, values, k in zip(*columns, strict=True)
    ]


def _apply_rules(
    logits: Tensor,
    rows: Sequence[int],
    index: Tensor,
    params: list[SamplingParams],
    table: RowTable,
    masks: Masks | None,
) -> Tensor:
    """Penalties, stop-token rules, bias, allow lists and grammars, for the rows that have any."""
    before = logits
    vocab = logits.shape[1]
    penalised = [i for i, p in enumerate(params) if p.uses_penalties]
    if penalised:
        at = index[penalised]
        scalars = table.scalars
        logits = logits.clone()
        logits[penalised] = sampling.penalise(
            logits[penalised],
            table.counts[at, :vocab],
            scalars["repetition_penalty"][at],
            scalars["frequency_penalty"][at],
            scalars["presence_penalty"][at],
        )
    boosted, biased = _collect_pairs(rows, params, table, vocab)
    if boosted:
        logits = sampling.boost(logits, *_columns(boosted, logits))
    if biased:
        logits = sampling.add_bias(logits, *_columns(biased, logits))
    allowing = [i for i, row in enumerate(rows) if row in table.allowed]
    if allowing:
        allowed = torch.stack([table.allowed[rows[i]][:vocab] for i in allowing])
        places = torch.tensor(allowing, device=logits.device)
        logits = sampling.allow_only(_copy_once(logits, before), places, allowed)
    if masks is not None and masks[0]:
        places = torch.tensor(masks[0], device=logits.device)
        legal = sampling.unpack_bits(masks[1].to(logits.device), vocab)
        logits = sampling.allow_only(_copy_once(logits, before), places, legal)
        if biased or allowing:
            before = sampling.allow_only(before.clone(), places, legal)
    if biased or allowing:
        # Rules that together forbid everything (a client's contradiction, or a grammar that leaves
        # no other way) are void, except for the grammar.
        void = logits.amax(-1, keepdim=True) == -torch.inf
        logits = torch.where(void, before, logits)
    return logits


def _copy_once(logits: Tensor, before: Tensor) -> Tensor:
    return logits.clone() if logits is before else logits


_Pairs = list[tuple[int, int, float]]  # (place in the batch, token id, value)


def _collect_pairs(
    rows: Sequence[int], params: list[SamplingParams], table: RowTable, vocab: int
) -> tuple[_Pairs, _Pairs]:
    """Single logits to change: (boosts of stop tokens, biases and bans)."""
    boosted: _Pairs = []
    biased: _Pairs = []
    for i, (row, p) in enumerate(zip(rows, params, strict=True)):
        num_outputs = table.num_outputs[row]
        if p.decay_factor != 1 and num_outputs > p.decay_start:
            factor = _decay(p.decay_factor, num_outputs - p.decay_start)
            boosted += [(i, t, factor) for t in set(p.stop_token_ids) if t < vocab]
        if num_outputs < p.min_new_tokens:
            biased += [(i, t, -torch.inf) for t in p.stop_token_ids if t < vocab]
        biased += [(i, t, -torch.inf if b <= -100 else b) for t, b in p.logit_bias if t < vocab]
    return boosted, biased


def _decay(factor: float, steps: int) -> float:
    try:
        return min(factor**steps - 1, _MOST_BOOST)
    except OverflowError:
        return _MOST_BOOST


def _columns(pairs: _Pairs, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, ids, values = zip(*pairs, strict=True)
    return (
        torch.tensor(rows, device=like.device),
        torch.tensor(ids, device=like.device),
        torch.tensor(values, dtype=like.dtype, device=like.device),
    )


def _choose(
    logits: Tensor,
    rows: Sequence[int],
    index: Tensor,
    params: list[SamplingParams],
    table: RowTable,
) -> Tensor:
    """Each row by its own way, decided by its own parameters, so its neighbours do not matter."""
    greedy = [i for i, p in enumerate(params) if p.temperature == 0]
    plain = [i for i, p in enumerate(params) if p.temperature != 0 and not _truncates(p)]
    truncated = [i for i, p in enumerate(params) if p.temperature != 0 and _truncates(p)]
    positions = torch.tensor([table.num_outputs[row] for row in rows], device=logits.device)
    noise = uniform(table.scalars["seed"][index], positions)
    ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    if greedy:
        ids[greedy] = _pick(logits, greedy).argmax(-1)
    if plain:
        ids[plain] = sampling.draw(_pick(logits, plain), noise[plain])
    if truncated:
        at = index[truncated]
        top_k, top_p, min_p = (table.scalars[name][at] for name in ("top_k", "top_p", "min_p"))
        ids[truncated] = sampling.draw_truncated(
            _pick(logits, truncated), noise[truncated], top_k, top_p, min_p
        )
    return ids


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _pick(x: Tensor, places: list[int]) -> Tensor:
    """x[places], without a copy when that is all of x."""
    return x if len(places) == len(x) else x[places]
