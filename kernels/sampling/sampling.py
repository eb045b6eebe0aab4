"""From logits to tokens: the formulas of every sampling parameter, each over a batch of rows.

Logits are float32 [num_rows, vocab] throughout, neighbouring ids side by side. Parameters come as
columns of the row table, and `rows` int64 [num_rows] says whose each row of logits is: several
may be one request's. No function looks across rows, so a row's token never depends on its
neighbours. None waits for the device. Which of them a step needs is decided in
`workers/sampling/sampler.py`; penalties are in `penalties.py`.
"""

import torch
from torch import Tensor


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


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(the first largest id, its logit or NaN if any is) of each row: int64, float32."""
    if not logits.is_cuda or not len(logits):
        peaks, ids = logits.max(-1)
        return ids, peaks
    from .sampling_triton import pick, scan

    return pick(scan(logits, None, None))


def draw(logits: Tensor, noise: Tensor, rows: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row from softmax(logits / temperature), by inverse CDF in the order of ids; the
    first largest where temperature is 0. noise [num_rows] float64 in [0, 1) -> as `greedy`."""
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
    """`draw` from what three rules leave at once. In the order (logit descending, id ascending)
    kept are the first `top_k` (int64, 0: all), while the mass before them is < `top_p` (>= 1: all),
    and while the probability is >= min_p * the largest. The first always is."""
    if not logits.is_cuda or not len(logits):
        return draw_truncated_reference(logits, noise, rows, temperature, top_k, top_p, min_p)
    from .cut_triton import find_cut
    from .sampling_triton import pick, scan

    found = scan(logits, rows, temperature)
    cut, sums = find_cut(found, rows, temperature, top_k, top_p, min_p)
    return pick(found, noise, rows, temperature, cut, sums)


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


def _weights(logits: Tensor, peaks: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities up to a factor; the likeliest weighs 1. Greedy rows as at temperature 1."""
    scale = torch.where(temperature > 0, temperature, 1)
    return ((logits - peaks[:, None]) / scale[:, None]).exp()


def _invert(mass: Tensor, noise: Tensor) -> Tensor:
    """First place where the running sum of mass passes noise * total; never one of mass 0."""
    running = mass.double().cumsum(-1)
    total = running[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # the product may round up to total
    target = torch.minimum(noise[:, None] * total, below)
    return torch.searchsorted(running, target, right=True).squeeze(1).clamp(max=mass.shape[1] - 1)


def logprobs(
    logits: Tensor, ids: Tensor, temperature: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities under softmax(logits / temperature) of ids [num_rows] and of the likeliest
    tokens; temperature [num_rows], 0 as 1.

    -> (logprob [num_rows], rank [num_rows] int64 (1 = likeliest), top ids [num_rows, num_top],
    top logprobs [num_rows, num_top]), likeliest first.
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
    own = table.gather(1, ids[:, None])
    rank = (table > own).sum(-1) + 1
    top, top_ids = table.topk(num_top, dim=-1)
    return own.squeeze(1), rank, top_ids, top
