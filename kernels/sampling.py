"""From logits to tokens: the formulas of every sampling parameter, each over a batch of rows.

Logits are float32 [num_rows, vocab] throughout. No function looks across rows, so a row's token
never depends on its neighbours. Which of them a step needs is decided in `workers/sampler.py`.
"""

import torch
from torch import Tensor


def penalise(
    logits: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Push down tokens by how often they came: counts [num_rows, vocab] int, the rest [num_rows].

    Where count > 0: a positive logit is divided by `repetition`, a negative one multiplied; then
    frequency * count and presence are subtracted.
    """
    seen = counts > 0
    repetition = repetition[:, None]
    pushed = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen, pushed, logits)
    return logits - frequency[:, None] * counts - presence[:, None] * seen


def boost(logits: Tensor, rows: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
    """logit += abs(logit) * factor at (rows[i], ids[i]), pairs all different; rows, ids int64,
    factors float32. Raises stop tokens as a text grows long."""
    old = logits[rows, ids]
    return logits.index_put((rows, ids), old + old.abs() * factors)


def add_bias(logits: Tensor, rows: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """logit += value at (rows[i], ids[i]); -inf bans. Pairs may repeat."""
    return logits.index_put((rows, ids), values, accumulate=True)


def allow_only(logits: Tensor, places: Tensor, allowed: Tensor) -> Tensor:
    """-inf for all tokens of the rows `places` int64 [n] but those set in `allowed` bool
    [n, vocab]. Changes `logits` in place and returns it."""
    logits[places] = logits[places].masked_fill(~allowed, -torch.inf)
    return logits


def unpack_bits(words: Tensor, num_ids: int) -> Tensor:
    """One bit per id in int32 words [n, ceil(vocab / 32)], the lowest first -> bool
    [n, num_ids]. Looks up 8 bools at a time, as one int64: at 64 rows of 154,880 ids 6 ms, where
    shifting took 24 ms (one x86 core). For little-endian machines."""
    octets = words.contiguous().view(torch.uint8).flatten().int()
    bits = torch.arange(256, device=words.device)[:, None] >> torch.arange(8, device=words.device)
    table = (bits & 1).bool().view(torch.int64).flatten()
    return table[octets].view(torch.bool).view(len(words), -1)[:, :num_ids]


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """One token per row from softmax(logits), by inverse CDF in vocabulary order.
    noise [num_rows] float64 in [0, 1) -> ids [num_rows] int64."""
    return _invert(logits.softmax(-1), noise)


def draw_truncated(
    logits: Tensor, noise: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The same after cutting the tail of the sorted list, by three rules at once.

    Kept are the first `top_k` (int64, 0: all), while the mass before them is < `top_p`
    (>= 1: all), and while the probability is >= min_p * the largest. The first always is.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(-1)
    places = torch.arange(mass.shape[1], device=mass.device)
    top_k = torch.where(top_k > 0, top_k, mass.shape[1])[:, None]
    top_p = torch.where(top_p < 1, top_p, torch.inf)[:, None]
    before = mass.double().cumsum(-1) - mass
    kept = (places < top_k) & (before < top_p) & (mass >= min_p[:, None] * mass[:, :1])
    kept[:, 0] = True
    place = _invert(mass.masked_fill(~kept, 0), noise)
    return ids.gather(1, place[:, None]).squeeze(1)


def _invert(mass: Tensor, noise: Tensor) -> Tensor:
    """First place where the running sum of mass passes noise * total; never one of mass 0."""
    running = mass.double().cumsum(-1)
    total = running[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # the product may round up to total
    target = torch.minimum(noise[:, None] * total, below)
    return torch.searchsorted(running, target, right=True).squeeze(1).clamp(max=mass.shape[1] - 1)


def logprobs(logits: Tensor, ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities under softmax(logits) of ids [num_rows] and of the likeliest tokens.

    -> (logprob [num_rows], rank [num_rows] (1 = likeliest), top ids [num_rows, num_top],
    top logprobs [num_rows, num_top]), likeliest first.
    """
    table = logits.log_softmax(-1)
    own = table.gather(1, ids[:, None])
    rank = (table > own).sum(-1) + 1
    top, top_ids = table.topk(min(num_top, table.shape[1]), dim=-1)
    return own.squeeze(1), rank, top_ids, top
