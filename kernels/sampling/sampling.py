"""From logits to tokens: the formula of every sampling parameter, each over a batch of rows, and
the random numbers for it.

Logits are float32 [num_rows, vocab] throughout, strided over rows only. Parameters are columns of
the row table, indexed by `rows` int64 [num_rows]; several rows of logits may belong to one request.
No function mixes rows, so the token of a row does not depend on the other rows. None waits for the
device. `workers/sampling/sampler.py` decides which of them a step needs; penalties are in
`penalties.py`.
"""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def allow_only(logits: Tensor, index: Tensor, allowed: Tensor) -> Tensor:
    """Set the logits of tokens that are not allowed to -inf, in place; returns `logits`.

    index int64 [n]: rows of logits, all different; allowed bool [n, vocab].
    """
    logits[index] = logits[index].masked_fill(~allowed, -torch.inf)
    return logits


def unpack_bits(words: Tensor, num_ids: int) -> Tensor:
    """Words int32 [n, ceil(vocab / 32)] with one bit per id, the lowest bit first -> bool
    [n, num_ids]. For little-endian machines.

    Looks up 8 bools at a time, as one int64. With 64 rows of 154,880 ids this takes 6 ms on one x86
    core; shifting bits took 24 ms.
    """
    octets = words.contiguous().view(torch.uint8).flatten().int()
    bits = torch.arange(256, device=words.device)[:, None] >> torch.arange(8, device=words.device)
    table = (bits & 1).bool().view(torch.int64).flatten()
    return table[octets].view(torch.bool).view(len(words), -1)[:, :num_ids]


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row: (the id of the largest logit, int64; that logit, float32). Of equal logits the
    lowest id is taken. If any logit of a row is NaN, so is the one returned."""
    if not logits.is_cuda or not len(logits):
        peaks, ids = logits.max(-1)
        return ids, peaks
    from .sampling_triton import pick, scan

    return pick(scan(logits, None, None))


def uniform(seeds: Tensor, positions: Tensor, rows: Tensor | None = None) -> Tensor:
    """A random number per pair of seed and position, [n] float64 in [0, 1), with 53 random bits:
    the same on every device and in every batch. On CUDA one launch.

    seeds, positions [n] int64, contiguous; with rows [n] int64, `seeds` is a column of the row
    table, and the seeds are seeds[rows]. Two rounds of splitmix64
    (https://prng.di.unimi.it/splitmix64.c), in int64 arithmetic, which wraps.
    """
    if seeds.is_cuda:
        from .noise_triton import launch_uniform

        return launch_uniform(seeds, positions, rows)
    if rows is not None:
        seeds = seeds[rows]
    bits = _mix(_mix(seeds + _GAMMA) + (positions + 1) * _GAMMA)
    return _shift(bits, 11).double() * 2.0**-53


def draw(logits: Tensor, noise: Tensor, rows: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row from softmax(logits / temperature), by inverse CDF in the order of ids.

    noise [num_rows] float64 in [0, 1); temperature: float32 column of the row table, 0 for greedy
    -> as `greedy`.
    """
    if not logits.is_cuda or not len(logits):
        return draw_reference(logits, noise, rows, temperature)
    from .sampling_triton import pick, scan

    return pick(scan(logits, rows, temperature), noise, rows, temperature)


def draw_truncated(
    logits: Tensor,
    noise: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """`draw` from the tokens that three rules keep.

    The tokens are taken in the order (logit descending, id ascending). A token is kept if it is
    among the first `top_k` (int64 column, 0: all), if the probabilities before it sum to less than
    `top_p` (>= 1: all), and if its own is at least min_p times the largest. The first token is
    always kept. All probabilities are those before truncation.
    """
    if not logits.is_cuda or not len(logits):
        return draw_truncated_reference(logits, noise, rows, temperature, top_k, top_p, min_p)
    from .cut_triton import find_cut
    from .sampling_triton import pick, scan

    scanned = scan(logits, rows, temperature)
    cut, sums = find_cut(scanned, rows, temperature, top_k, top_p, min_p)
    return pick(scanned, noise, rows, temperature, cut, sums)


def draw_reference(
    logits: Tensor, noise: Tensor, rows: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """`draw` in plain torch."""
    peaks, first = logits.max(-1)
    temperature = temperature[rows]
    drawn = _invert(_weights(logits, peaks, temperature), noise)
    return torch.where(temperature > 0, drawn, first), peaks


def draw_truncated_reference(
    logits: Tensor,
    noise: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """`draw_truncated` in plain torch."""
    peaks, first = logits.max(-1)
    temperature, vocab = temperature[rows], logits.shape[1]
    most, share = top_k[rows][:, None], top_p[rows][:, None]
    most = torch.where(most > 0, most, vocab)
    share = torch.where(share < 1, share, torch.inf)
    weights = _weights(logits, peaks, temperature)
    ids = logits.sort(dim=-1, descending=True, stable=True).indices
    ordered = weights.gather(1, ids)
    running = ordered.double().cumsum(-1)
    before, total = running - ordered, running[:, -1:]
    kept = torch.arange(vocab, device=logits.device) < most
    kept &= (before < share * total) & (ordered >= min_p[rows][:, None])
    kept[:, 0] = True
    kept = torch.zeros_like(kept).scatter_(1, ids, kept)
    drawn = _invert(weights.masked_fill(~kept, 0), noise)
    return torch.where(temperature > 0, drawn, first), peaks


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, count: int) -> Tensor:
    """Logical shift right; torch's own repeats the sign bit."""
    return torch.bitwise_right_shift(x, count) & ((1 << (64 - count)) - 1)


def _weights(logits: Tensor, peaks: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities up to a factor: the largest is 1. Greedy rows as at temperature 1."""
    scale = torch.where(temperature > 0, temperature, 1)
    return ((logits - peaks[:, None]) / scale[:, None]).exp()


def _invert(mass: Tensor, noise: Tensor) -> Tensor:
    """The first index at which the running sum of mass [num_rows, n] exceeds noise * total. Never
    one of mass 0."""
    running = mass.double().cumsum(-1)
    total = running[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # the product may round up to total
    target = torch.minimum(noise[:, None] * total, below)
    return torch.searchsorted(running, target, right=True).squeeze(1).clamp(max=mass.shape[1] - 1)


def logprobs(
    logits: Tensor, ids: Tensor, temperature: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities under softmax(logits / temperature) of given ids and of the likeliest ones.

    ids [num_rows] int64; temperature [num_rows] float32, 0 counts as 1
    -> (logprob [num_rows] float32, rank [num_rows] int64, 1 for the likeliest, top ids int64 and
    top logprobs float32 [num_rows, num_top], the likeliest first).
    """
    num_top = min(num_top, logits.shape[1])
    if logits.is_cuda and len(logits):
        from .logprobs_triton import MOST_TOP, launch_logprobs

        if num_top <= MOST_TOP:
            return launch_logprobs(logits, ids, temperature, num_top)
    return logprobs_reference(logits, ids, temperature, num_top)


def logprobs_reference(
    logits: Tensor, ids: Tensor, temperature: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`logprobs` in plain torch; num_top <= vocab."""
    scale = torch.where(temperature > 0, temperature, 1)[:, None]
    table = (logits / scale).log_softmax(-1)
    chosen = table.gather(1, ids[:, None])
    rank = (table > chosen).sum(-1) + 1
    top, top_ids = table.topk(num_top, dim=-1)
    return chosen.squeeze(1), rank, top_ids, top
