"""Triton kernels that find where top-k and top-p cut a row, without sorting it.

The kept tokens are the first ones in the order (logit descending, id ascending). So a cut is a
logit, above which all tokens are kept, and a number of tokens among those that equal the next one.
The search narrows an interval of logits, low < x <= high: the tokens above `high` are too few and
those above `low` are enough. Each round counts and weighs, chunk by chunk, the tokens above each of
`STEPS` thresholds inside the interval; then one program per row moves the ends of the interval to
the thresholds around the cut. A row is done when the interval holds a single token or equal ones.
Rows that the rounds leave open, with many logits close together, are finished by bisection.
Example: top_k = 3 of the logits 9, 7, 5, 5, 1.

    round   low    high   thresholds   tokens above   moves
    1       -inf   9      8, 6, 4      1, 2, 4        high to 6 (2 tokens are too few), low to 4
    2       4      6      -            -              equal tokens left: the tie is 5, 1 is kept

Weights are summed in float32 within a chunk and in float64 over chunks, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling_triton import Cut, Scan, inverse_temperature, load_logits, weigh

STEPS = 16
ROUNDS = 6

# Indices in the state of a row's search: float64 [5] and int32 [4]. LOW and HIGH are the interval,
# MASS and COUNT are the weight and number of the tokens above HIGH, COUNT_LOW is the number of
# those above LOW. A token is kept while the weight before it is less than LIMIT and the number of
# tokens before it is less than MOST. TOP is the largest logit.
_LOW, _HIGH, _MASS, _LIMIT, _TOP = (tl.constexpr(i) for i in range(5))
_COUNT, _COUNT_LOW, _MOST, _DONE = (tl.constexpr(i) for i in range(4))
_ALL = tl.constexpr(2**31 - 1)


@triton.jit
def _begin_kernel(
    rows, temperature, top_k, top_p, peaks, sums, floats, ints, thresholds, cuts, kept_ties,
    width, num_chunks, CHUNKS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Start the search of a row: between its largest logit and -inf, with thresholds where the cut
    is likely. The row is done at once if top-k and top-p keep everything."""
    at = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS)
    is_chunk = chunks < num_chunks
    peak = tl.load(peaks + at * num_chunks + chunks, mask=is_chunk, other=float("-inf"))
    top = tl.max(peak, 0)
    row = tl.load(rows + at)
    inverse = inverse_temperature(temperature, row)
    weight = tl.load(sums + at * num_chunks + chunks, mask=is_chunk, other=0.0)
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
    """Of the tokens of one chunk that are inside the interval: number and weight above each
    threshold, smallest and largest logit."""
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
            steps = tl.arange(0, STEPS)
            tl.store(counts + out * STEPS + steps, steps * 0)
            tl.store(masses + out * STEPS + steps, steps * 0.0)
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
    """Finish a row whose interval holds only equal tokens: store how many of them are kept."""
    mass = tl.load(floats + at * 5 + _MASS)
    limit = tl.load(floats + at * 5 + _LIMIT)
    top = tl.load(floats + at * 5 + _TOP).to(tl.float32)
    each = weigh(tie, top, inverse).to(tl.float64)
    num_kept = tl.ceil((limit - mass) / each)  # inf if each is 0 or there is no limit
    num_kept = tl.where(num_kept < 1e9, num_kept, 1e9).to(tl.int32)
    most_left = tl.load(ints + at * 4 + _MOST) - tl.load(ints + at * 4 + _COUNT)
    num_kept = tl.minimum(num_kept, most_left)
    tl.store(cuts + at * 2, tie)
    tl.store(cuts + at * 2 + 1, tie)
    tl.store(kept_ties + at, tl.maximum(num_kept, 1))


@triton.jit
def _lay_out(high, low, share, is_known, STEPS: tl.constexpr):
    """Thresholds from high down to low. If is_known, the cut is expected at `share` of the way, and
    thresholds are closer together near it. The last threshold is `low`, so that at least the
    smallest token inside the interval is separated from the others."""
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
    """Of one row: move the ends of the interval to the thresholds around the cut, and lay out the
    next thresholds."""
    at = tl.program_id(0)
    if tl.load(ints + at * 4 + _DONE) == 0:
        chunks = tl.arange(0, CHUNKS)
        steps = tl.arange(0, STEPS)
        is_chunk = chunks < num_chunks
        index = at * num_chunks + chunks
        smallest = tl.min(tl.load(least + index, mask=is_chunk, other=float("inf")), 0)
        largest = tl.max(tl.load(most + index, mask=is_chunk, other=float("-inf")), 0)
        if smallest == largest:
            inverse = inverse_temperature(temperature, tl.load(rows + at))
            _settle_ties(at, floats, ints, cuts, kept_ties, largest, inverse)
            tl.store(ints + at * 4 + _DONE, 1)
        else:
            grid = index[:, None] * STEPS + steps[None, :]
            more = tl.load(counts + grid, mask=is_chunk[:, None], other=0)
            heavier = tl.load(masses + grid, mask=is_chunk[:, None], other=0.0)
            count_high = tl.load(ints + at * 4 + _COUNT)
            count_low = tl.load(ints + at * 4 + _COUNT_LOW)
            mass_high = tl.load(floats + at * 5 + _MASS)
            count = count_high + tl.sum(more, 0)
            mass = mass_high + tl.sum(heavier.to(tl.float64), 0)
            threshold = tl.load(thresholds + at * STEPS + steps)
            # Is the threshold above the cut? Then too few tokens are above it. A threshold below
            # all tokens is below the cut, however the sums are rounded.
            is_above = (count < tl.load(ints + at * 4 + _MOST)) & (threshold >= smallest)
            is_above = is_above & (mass < tl.load(floats + at * 5 + _LIMIT))
            high = tl.load(floats + at * 5 + _HIGH).to(tl.float32)
            high = tl.minimum(high, largest)
            high = tl.minimum(high, tl.min(tl.where(is_above, threshold, float("inf")), 0))
            low = tl.load(floats + at * 5 + _LOW).to(tl.float32)
            low = tl.maximum(low, tl.max(tl.where(is_above, float("-inf"), threshold), 0))
            count_high = tl.maximum(count_high, tl.max(tl.where(is_above, count, 0), 0))
            count_low = tl.minimum(count_low, tl.min(tl.where(is_above, _ALL, count), 0))
            mass_high = tl.maximum(mass_high, tl.max(tl.where(is_above, mass, 0.0), 0))
            tl.store(floats + at * 5 + _LOW, low.to(tl.float64))
            tl.store(floats + at * 5 + _HIGH, high.to(tl.float64))
            tl.store(floats + at * 5 + _MASS, mass_high)
            tl.store(ints + at * 4 + _COUNT, count_high)
            tl.store(ints + at * 4 + _COUNT_LOW, count_low)
            if count_low - count_high == 1:
                tl.store(cuts + at * 2, low)
                tl.store(ints + at * 4 + _DONE, 1)
            between = tl.min(tl.where(is_above, 1e30, mass), 0) - mass_high
            share = tl.minimum(tl.load(floats + at * 5 + _LIMIT), 1e30) - mass_high
            share = share / tl.maximum(between, 1e-30)
            most_left = (tl.load(ints + at * 4 + _MOST) - count_high).to(tl.float64)
            share = tl.minimum(share, most_left / (count_low - count_high).to(tl.float64))
            share = tl.minimum(tl.maximum(share, 0.0), 1.0).to(tl.float32)
            threshold = _lay_out(high, tl.maximum(low, smallest), share, count_low < _ALL, STEPS)
            tl.store(thresholds + at * STEPS + steps, threshold)


@triton.jit
def _key(bits):
    """int32 bits of a float32 -> int32 in the order of the floats; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ends(logits, at, stride, width, low, high, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """-> (smallest, largest) logit with low < x <= high."""
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
    """Of one row that the rounds left open: bisect the interval until its tokens are equal."""
    at = tl.program_id(0)
    if tl.load(ints + at * 4 + _DONE) == 0:
        inverse = inverse_temperature(temperature, tl.load(rows + at))
        top = tl.load(floats + at * 5 + _TOP).to(tl.float32)
        limit = tl.load(floats + at * 5 + _LIMIT)
        most_tokens = tl.load(ints + at * 4 + _MOST)
        low = tl.load(floats + at * 5 + _LOW).to(tl.float32)
        high = tl.load(floats + at * 5 + _HIGH).to(tl.float32)
        mass_high = tl.load(floats + at * 5 + _MASS)
        count_high = tl.load(ints + at * 4 + _COUNT)
        least, most = _ends(logits, at, stride, width, low, high, CHUNK, GROUP)
        while least < most:
            a = _key(least.to(tl.int32, bitcast=True))
            b = _key(most.to(tl.int32, bitcast=True))
            middle = _key((a & b) + ((a ^ b) >> 1)).to(tl.float32, bitcast=True)  # no overflow
            count = count_high
            mass = mass_high
            for start in range(0, width, CHUNK):
                x = load_logits(logits, at, stride, start + tl.arange(0, CHUNK), width, GROUP)
                above = (x > middle) & (x <= high)
                count += tl.sum(above.to(tl.int32), 0)
                mass += tl.sum(tl.where(above, weigh(x, top, inverse), 0.0), 0).to(tl.float64)
            if (count < most_tokens) & (mass < limit):
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
    """Of one chunk: the weight of the tokens above the cut, and the number of those that equal the
    tie. If nothing is cut, the weights are the sums of the scan, to the last bit."""
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
    scanned: Scan,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    num_rounds: int = ROUNDS,
) -> tuple[Cut, Tensor]:
    """Find where top-k, top-p and min-p cut the rows of a scan; other arguments as for
    `draw_truncated`. num_rounds: rounds before bisection; tests try others.

    -> (the cut of each row, sums of the weights above it [num_rows, num_chunks] float64).
    """
    logits, num_rows = scanned.logits, len(scanned.logits)
    stride, width, num_chunks, group = scanned.shape

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
    kept_sums = torch.empty_like(scanned.sums)
    by_row, by_chunk = (num_rows,), (num_chunks, num_rows)
    chunks = triton.next_power_of_2(num_chunks)
    _begin_kernel[by_row](
        rows, temperature, top_k, top_p, scanned.peaks, scanned.sums, floats, ints, thresholds,
        cut.values, cut.kept_ties, width, num_chunks, CHUNKS=chunks, STEPS=STEPS, num_warps=1,
    )  # fmt: skip
    for _ in range(num_rounds):
        _measure_kernel[by_chunk](
            logits, rows, temperature, floats, ints, thresholds, counts, masses, least, most,
            stride, width, num_chunks, STEPS=STEPS, CHUNK=scanned.chunk, GROUP=group, num_warps=8,
        )  # fmt: skip
        _narrow_kernel[by_row](
            rows, temperature, floats, ints, thresholds, counts, masses, least, most,
            cut.values, cut.kept_ties, num_chunks, STEPS=STEPS, CHUNKS=chunks, num_warps=4,
        )  # fmt: skip
    _finish_kernel[by_row](
        logits, rows, temperature, floats, ints, cut.values, cut.kept_ties, stride, width,
        CHUNK=scanned.chunk, GROUP=group, num_warps=8,
    )  # fmt: skip
    _weigh_kernel[by_chunk](
        logits, rows, temperature, min_p, floats, cut.values, cut.kept_ties, scanned.peaks,
        scanned.sums, kept_sums, cut.ties, stride, width, num_chunks,
        CHUNK=scanned.chunk, GROUP=group, num_warps=8,
    )  # fmt: skip
    return cut, kept_sums
