"""Triton kernels that find where top-k and top-p cut a row, without sorting it.

Kept are the first tokens in the order (logit descending, id ascending), so a cut is a logit and,
among those that equal it, a number of tokens. It is searched between two logits, `low` < x <=
`high`: were the row cut just above `high`, a token would be missing; `low` is below the cut. A
round counts and weighs, chunk by chunk, what lies above each of `STEPS` thresholds in between;
then one program per row moves the ends. A row is done when one token is left in between, or equal
ones. What the rounds leave open (logits that crowd) one program per row ends by halving.

Weights are summed in float32 within a chunk and in float64 over chunks, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling_triton import Cut, Scan, inverse_temperature, load_logits, weigh

STEPS = 16
ROUNDS = 6

# The search of one row: float64 [5] and int32 [4].
_LOW, _HIGH, _MASS, _LIMIT, _TOP = (tl.constexpr(i) for i in range(5))
_COUNT, _COUNT_LOW, _MOST, _DONE = (tl.constexpr(i) for i in range(4))
_ALL = tl.constexpr(2**31 - 1)


@triton.jit
def _begin_kernel(
    rows, temperature, top_k, top_p, peaks, sums, floats, ints, thresholds, cuts, kept_ties,
    width, num_chunks, CHUNKS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The search of a row before the first round: between its largest logit and -inf, with
    thresholds where the cut is likely. Done at once where top-k and top-p keep everything."""
    at = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS)
    real = chunks < num_chunks
    peak = tl.load(peaks + at * num_chunks + chunks, mask=real, other=float("-inf"))
    top = tl.max(peak, 0)
    row = tl.load(rows + at)
    inverse = inverse_temperature(temperature, row)
    weight = tl.load(sums + at * num_chunks + chunks, mask=real, other=0.0)
    scale = tl.where(peak == float("-inf"), 0.0, weigh(peak, top, inverse))
    total = tl.sum(weight * scale.to(tl.float64), 0)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row).to(tl.float64)
    cuts_k = (k > 0) & (k < width)
    is_open = (tl.load(temperature + row) > 0) & (cuts_k | (p < 1))
    is_open = is_open & (top > float("-inf")) & (top < float("inf"))
    tl.store(floats + at * 5 + _LOW, float("-inf"))
    tl.store(floats + at * 5 + _HIGH, top.to(tl.float64))
    tl.store(floats + at * 5 + _MASS, 0.0)
    limit = tl.where(p < 1, tl.maximum(p * total, 1e-300), float("inf"))
    tl.store(floats + at * 5 + _LIMIT, limit)
    tl.store(floats + at * 5 + _TOP, top.to(tl.float64))
    tl.store(ints + at * 4 + _COUNT, 0)
    tl.store(ints + at * 4 + _COUNT_LOW, _ALL)
    tl.store(ints + at * 4 + _MOST, tl.where(cuts_k, k, _ALL).to(tl.int32))
    tl.store(ints + at * 4 + _DONE, 1 - is_open.to(tl.int32))
    tl.store(cuts + at * 2, float("-inf"))
    tl.store(cuts + at * 2 + 1, float("nan"))
    tl.store(kept_ties + at, 0)
    steps = tl.arange(0, STEPS)
    below = 0.125 * tl.exp(5.25 / STEPS * steps.to(tl.float32))  # 1/8 to 24, times temperature
    tl.store(thresholds + at * STEPS + steps, top - below / inverse)


@triton.jit
def _measure_kernel(
    logits, rows, temperature, floats, ints, thresholds, counts, masses, least, most,
    stride, width, num_chunks,
    STEPS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of one chunk, between the ends: how many and how heavy above each threshold; the least and
    the most there is."""
    chunk, at = tl.program_id(0), tl.program_id(1)
    if tl.load(ints + at * 4 + _DONE) == 0:
        x = load_logits(logits, at, stride, chunk * CHUNK + tl.arange(0, CHUNK), width, GROUP)
        inside = (x > tl.load(floats + at * 5 + _LOW).to(tl.float32)) & (
            x <= tl.load(floats + at * 5 + _HIGH).to(tl.float32)
        )
        out = at * num_chunks + chunk
        largest = tl.max(tl.where(inside, x, float("-inf")), 0)
        tl.store(most + out, largest)
        tl.store(least + out, tl.min(tl.where(inside, x, float("inf")), 0))
        if largest == float("-inf"):
            nothing = tl.arange(0, STEPS)
            tl.store(counts + out * STEPS + nothing, nothing * 0)
            tl.store(masses + out * STEPS + nothing, nothing * 0.0)
        else:
            inverse = inverse_temperature(temperature, tl.load(rows + at))
            weight = weigh(x, tl.load(floats + at * 5 + _TOP).to(tl.float32), inverse)
            x = tl.where(inside, x, float("-inf"))
            for step in tl.static_range(STEPS):
                above = x > tl.load(thresholds + at * STEPS + step)
                tl.store(counts + out * STEPS + step, tl.sum(above.to(tl.int32), 0))
                tl.store(masses + out * STEPS + step, tl.sum(tl.where(above, weight, 0.0), 0))


@triton.jit
def _settle_ties(at, floats, ints, cuts, kept_ties, tie, inverse):
    """The tokens between the ends are all equal: the first so many of them stay."""
    mass = tl.load(floats + at * 5 + _MASS)
    limit = tl.load(floats + at * 5 + _LIMIT)
    top = tl.load(floats + at * 5 + _TOP).to(tl.float32)
    each = weigh(tie, top, inverse).to(tl.float64)
    some = tl.ceil((limit - mass) / each)  # inf if each or limit says so
    some = tl.where(some < 1e9, some, 1e9).to(tl.int32)
    some = tl.minimum(some, tl.load(ints + at * 4 + _MOST) - tl.load(ints + at * 4 + _COUNT))
    tl.store(cuts + at * 2, tie)
    tl.store(cuts + at * 2 + 1, tie)
    tl.store(kept_ties + at, tl.maximum(some, 1))


@triton.jit
def _lay_out(high, low, share, is_known, STEPS: tl.constexpr):
    """Thresholds from high down to low. The cut is expected where `share` of the way is done, if
    that is known: then they lie the closer, the nearer to it. The last is `low`, so that at least
    the least token between the ends is told from the others."""
    steps = tl.arange(0, STEPS)
    middle = STEPS // 2 - 1
    distance = tl.abs(steps - middle)
    offset = 0.4 * tl.exp(0.8 * (distance - middle).to(tl.float32))
    offset = tl.where(steps < middle, -offset, tl.where(steps > middle, offset, 0.0))
    part = tl.where(is_known, share + offset, (steps + 1).to(tl.float32) / STEPS)
    part = tl.where(steps == STEPS - 1, 1.0, tl.minimum(tl.maximum(part, 0.0), 1.0))
    threshold = high * (1 - part) + low * part
    return tl.where(part == 1, low, tl.minimum(tl.maximum(threshold, low), high))


@triton.jit
def _narrow_kernel(
    rows, temperature, floats, ints, thresholds, counts, masses, least, most, cuts, kept_ties,
    num_chunks, STEPS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Of one row: move the ends to the thresholds around the cut, and lay out the next ones."""
    at = tl.program_id(0)
    if tl.load(ints + at * 4 + _DONE) == 0:
        chunks = tl.arange(0, CHUNKS)
        steps = tl.arange(0, STEPS)
        real = chunks < num_chunks
        here = at * num_chunks + chunks
        smallest = tl.min(tl.load(least + here, mask=real, other=float("inf")), 0)
        largest = tl.max(tl.load(most + here, mask=real, other=float("-inf")), 0)
        if smallest == largest:
            inverse = inverse_temperature(temperature, tl.load(rows + at))
            _settle_ties(at, floats, ints, cuts, kept_ties, largest, inverse)
            tl.store(ints + at * 4 + _DONE, 1)
        else:
            grid = here[:, None] * STEPS + steps[None, :]
            more = tl.load(counts + grid, mask=real[:, None], other=0)
            heavier = tl.load(masses + grid, mask=real[:, None], other=0.0)
            count_high = tl.load(ints + at * 4 + _COUNT)
            count_low = tl.load(ints + at * 4 + _COUNT_LOW)
            mass_high = tl.load(floats + at * 5 + _MASS)
            count = count_high + tl.sum(more, 0)
            mass = mass_high + tl.sum(heavier.to(tl.float64), 0)
            threshold = tl.load(thresholds + at * STEPS + steps)
            # A threshold below all tokens is below the cut, whatever the rounding of sums says.
            stays = (count < tl.load(ints + at * 4 + _MOST)) & (threshold >= smallest)
            stays = stays & (mass < tl.load(floats + at * 5 + _LIMIT))
            high = tl.load(floats + at * 5 + _HIGH).to(tl.float32)
            high = tl.minimum(high, largest)
            high = tl.minimum(high, tl.min(tl.where(stays, threshold, float("inf")), 0))
            low = tl.load(floats + at * 5 + _LOW).to(tl.float32)
            low = tl.maximum(low, tl.max(tl.where(stays, float("-inf"), threshold), 0))
            count_high = tl.maximum(count_high, tl.max(tl.where(stays, count, 0), 0))
            count_low = tl.minimum(count_low, tl.min(tl.where(stays, _ALL, count), 0))
            mass_high = tl.maximum(mass_high, tl.max(tl.where(stays, mass, 0.0), 0))
            tl.store(floats + at * 5 + _LOW, low.to(tl.float64))
            tl.store(floats + at * 5 + _HIGH, high.to(tl.float64))
            tl.store(floats + at * 5 + _MASS, mass_high)
            tl.store(ints + at * 4 + _COUNT, count_high)
            tl.store(ints + at * 4 + _COUNT_LOW, count_low)
            if count_low - count_high == 1:
                tl.store(cuts + at * 2, low)
                tl.store(ints + at * 4 + _DONE, 1)
            between = tl.min(tl.where(stays, 1e30, mass), 0) - mass_high
            share = tl.minimum(tl.load(floats + at * 5 + _LIMIT), 1e30) - mass_high
            share = share / tl.maximum(between, 1e-30)
            most_left = (tl.load(ints + at * 4 + _MOST) - count_high).to(tl.float64)
            share = tl.minimum(share, most_left / (count_low - count_high).to(tl.float64))
            share = tl.minimum(tl.maximum(share, 0.0), 1.0).to(tl.float32)
            threshold = _lay_out(high, tl.maximum(low, smallest), share, count_low < _ALL, STEPS)
            tl.store(thresholds + at * STEPS + steps, threshold)


@triton.jit
def _key(bits):
    """int32 bits of a float32 -> int32 in the order of the floats, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ends(logits, at, stride, width, low, high, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """(least, most) logit with low < x <= high."""
    least = float("inf")
    most = float("-inf")
    for start in range(0, width, CHUNK):
        x = load_logits(logits, at, stride, start + tl.arange(0, CHUNK), width, GROUP)
        inside = (x > low) & (x <= high)
        least = tl.minimum(least, tl.min(tl.where(inside, x, float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(inside, x, float("-inf")), 0))
    return least, most


@triton.jit
def _finish_kernel(
    logits, rows, temperature, floats, ints, cuts, kept_ties, stride, width,
    CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of one row that the rounds left open: halve what is between the ends until it is equal."""
    at = tl.program_id(0)
    if tl.load(ints + at * 4 + _DONE) == 0:
        inverse = inverse_temperature(temperature, tl.load(rows + at))
        top = tl.load(floats + at * 5 + _TOP).to(tl.float32)
        limit = tl.load(floats + at * 5 + _LIMIT)
        fewer = tl.load(ints + at * 4 + _MOST)
        low = tl.load(floats + at * 5 + _LOW).to(tl.float32)
        high = tl.load(floats + at * 5 + _HIGH).to(tl.float32)
        mass_high = tl.load(floats + at * 5 + _MASS)
        count_high = tl.load(ints + at * 4 + _COUNT)
        least, most = _ends(logits, at, stride, width, low, high, CHUNK, GROUP)
        while least < most:
            one = _key(least.to(tl.int32, bitcast=True))
            other = _key(most.to(tl.int32, bitcast=True))
            middle = _key((one & other) + ((one ^ other) >> 1)).to(tl.float32, bitcast=True)
            count = count_high
            mass = mass_high
            for start in range(0, width, CHUNK):
                x = load_logits(logits, at, stride, start + tl.arange(0, CHUNK), width, GROUP)
                above = (x > middle) & (x <= high)
                count += tl.sum(above.to(tl.int32), 0)
                mass += tl.sum(tl.where(above, weigh(x, top, inverse), 0.0), 0).to(tl.float64)
            if (count < fewer) & (mass < limit):
                high = middle
                count_high = count
                mass_high = mass
            else:
                low = middle
            least, most = _ends(logits, at, stride, width, low, high, CHUNK, GROUP)
        tl.store(floats + at * 5 + _MASS, mass_high)
        tl.store(ints + at * 4 + _COUNT, count_high)
        _settle_ties(at, floats, ints, cuts, kept_ties, most, inverse)


@triton.jit
def _weigh_kernel(
    logits, rows, temperature, min_p, floats, cuts, kept_ties, peaks, sums, kept_sums, ties,
    stride, width, num_chunks, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of one chunk: the weights above the cut, and how many tokens equal the tie. Where nothing is
    cut, these are the sums of the scan, to the last bit."""
    chunk, at = tl.program_id(0), tl.program_id(1)
    out = at * num_chunks + chunk
    row = tl.load(rows + at)
    cut = tl.load(cuts + at * 2)
    least = tl.load(min_p + row)
    if (cut == float("-inf")) & (least == 0):
        tl.store(kept_sums + out, tl.load(sums + out))
        tl.store(ties + out, 0)
    else:
        x = load_logits(logits, at, stride, chunk * CHUNK + tl.arange(0, CHUNK), width, GROUP)
        inverse = inverse_temperature(temperature, row)
        top = tl.load(floats + at * 5 + _TOP).to(tl.float32)
        likely = weigh(x, top, inverse) >= least
        weight = weigh(x, tl.load(peaks + out), inverse)
        kept = tl.where(likely & (x > cut), weight, 0.0)
        tl.store(kept_sums + out, tl.sum(kept.to(tl.float64), 0))
        equal = likely & (x == tl.load(cuts + at * 2 + 1))
        tl.store(ties + out, tl.sum(equal.to(tl.int32), 0))


def find_cut(
    found: Scan,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    num_rounds: int = ROUNDS,
) -> tuple[Cut, Tensor]:
    """-> (the cut of each row, sums of the weights above it [num_rows, num_chunks] float64)."""
    logits, num_rows = found.logits, len(found.logits)
    stride, width, num_chunks, group = found.shape

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    floats, ints = empty(torch.float64, num_rows, 5), empty(torch.int32, num_rows, 4)
    thresholds = empty(torch.float32, num_rows, STEPS)
    counts = empty(torch.int32, num_rows, num_chunks, STEPS)
    masses = empty(torch.float32, num_rows, num_chunks, STEPS)
    least, most = empty(torch.float32, 2, num_rows, num_chunks)
    cut = Cut(
        values=empty(torch.float32, num_rows, 2),
        kept_ties=empty(torch.int32, num_rows),
        ties=empty(torch.int32, num_rows, num_chunks),
        min_p=min_p,
    )
    kept_sums = torch.empty_like(found.sums)
    by_row, by_chunk = (num_rows,), (num_chunks, num_rows)
    chunks = triton.next_power_of_2(num_chunks)
    _begin_kernel[by_row](
        rows, temperature, top_k, top_p, found.peaks, found.sums, floats, ints, thresholds,
        cut.values, cut.kept_ties, width, num_chunks, CHUNKS=chunks, STEPS=STEPS, num_warps=1,
    )  # fmt: skip
    for _ in range(num_rounds):
        _measure_kernel[by_chunk](
            logits, rows, temperature, floats, ints, thresholds, counts, masses, least, most,
            stride, width, num_chunks, STEPS=STEPS, CHUNK=found.chunk, GROUP=group, num_warps=8,
        )  # fmt: skip
        _narrow_kernel[by_row](
            rows, temperature, floats, ints, thresholds, counts, masses, least, most,
            cut.values, cut.kept_ties, num_chunks, STEPS=STEPS, CHUNKS=chunks, num_warps=4,
        )  # fmt: skip
    _finish_kernel[by_row](
        logits, rows, temperature, floats, ints, cut.values, cut.kept_ties, stride, width,
        CHUNK=found.chunk, GROUP=group, num_warps=8,
    )  # fmt: skip
    _weigh_kernel[by_chunk](
        logits, rows, temperature, min_p, floats, cut.values, cut.kept_ties, found.peaks,
        found.sums, kept_sums, cut.ties, stride, width, num_chunks,
        CHUNK=found.chunk, GROUP=group, num_warps=8,
    )  # fmt: skip
    return cut, kept_sums
