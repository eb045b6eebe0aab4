"""Triton kernels of `sampling.py` but for the search of the cut, which is in `cut_triton.py`.

A row of logits is looked at in chunks of `CHUNK` ids, one program each, so that a single row
keeps many cores busy. What chunks say about themselves is put together by one program per row, in
a fixed order: no result depends on timing or on the rest of the batch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096


@triton.jit
def load_logits(logits, row, stride, ids, width, GROUP: tl.constexpr):
    """float32 logits of a row, -inf behind its end. `GROUP` divides width, so that the mask is
    alike for neighbours and loads can be wide."""
    inside = ids // GROUP < width // GROUP
    return tl.load(logits + row.to(tl.int64) * stride + ids, mask=inside, other=float("-inf"))


@triton.jit
def inverse_temperature(temperature, row):
    """1 / temperature; finite for the smallest, too. Of use to rows that sample alone."""
    return 1.0 / tl.maximum(tl.load(temperature + row), 1e-30)


@triton.jit
def weigh(x, top, inverse):
    """exp((x - top) / temperature), where -inf (also as the largest of all) weighs nothing."""
    top = tl.where(top == float("-inf"), 0.0, top)
    return tl.exp((x - top) * inverse)


@triton.jit
def _scan_kernel(
    logits, rows, temperature, peaks, places, sums, stride, width, num_chunks,
    SUM: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of one chunk: the largest logit (NaN if any is), where it is, the sum of weights."""
    chunk, at = tl.program_id(0), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits, at, stride, ids, width, GROUP)
    peak = tl.max(x, 0)
    place = tl.min(tl.where(x == peak, ids, width - 1), 0)
    out = at * num_chunks + chunk
    tl.store(places + out, place)
    tl.store(peaks + out, tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), peak))
    if SUM:
        inverse = inverse_temperature(temperature, tl.load(rows + at))
        tl.store(sums + out, tl.sum(weigh(x, peak, inverse).to(tl.float64), 0))


@triton.jit
def _first_place(running, weights, places, target, LAST: tl.constexpr):
    """First place of some weight where the running sum passes `target`; the last of some weight
    where rounding lets none pass; 0 if all weights are 0 or NaN."""
    passes = (running > target) & (weights > 0)
    first = tl.min(tl.where(passes, places, LAST), 0)
    last = tl.max(tl.where(weights > 0, places, 0), 0)
    return tl.where(first == LAST, last, first)


@triton.jit
def _pick_kernel(
    logits, noise, rows, temperature, peaks, places, sums, cuts, min_p, ties, kept_ties,
    ids_out, peaks_out, stride, width, num_chunks,
    DRAW: tl.constexpr, CUT: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of one row: the largest logit and its id or, where it samples, the id that inverse CDF in
    the order of ids gives. First the chunk is chosen, then the id in it."""
    at = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS)
    real = chunks < num_chunks
    peak = tl.load(peaks + at * num_chunks + chunks, mask=real, other=float("-inf"))
    top = tl.max(peak, 0)
    is_bad = tl.max((peak != peak).to(tl.int32), 0) > 0
    tl.store(peaks_out + at, tl.where(is_bad, float("nan"), top))
    first = tl.min(tl.where(peak == top, chunks, num_chunks - 1), 0)
    token = tl.load(places + at * num_chunks + first)
    if DRAW:
        row = tl.load(rows + at)
        if tl.load(temperature + row) > 0:
            inverse = inverse_temperature(temperature, row)
            weight = tl.load(sums + at * num_chunks + chunks, mask=real, other=0.0)
            tied = tl.zeros((CHUNKS,), tl.int32)
            cut = float("-inf")
            tie = float("nan")
            if CUT:
                cut = tl.load(cuts + at * 2)
                tie = tl.load(cuts + at * 2 + 1)
                tied = tl.load(ties + at * num_chunks + chunks, mask=real, other=0)
                before = tl.cumsum(tied, 0) - tied
                kept = tl.minimum(tl.maximum(tl.load(kept_ties + at) - before, 0), tied)
                extra = tl.where(kept > 0, weigh(tie, peak, inverse), 0.0).to(tl.float64)
                weight += kept * extra
            scale = tl.where(peak == float("-inf"), 0.0, weigh(peak, top, inverse)).to(tl.float64)
            weight = weight * scale
            running = tl.cumsum(weight, 0)
            total = tl.max(running, 0)
            target = tl.minimum(tl.load(noise + at) * total, total * 0.9999999999999999)
            chunk = _first_place(running, weight, chunks, target, CHUNKS)
            here = chunks == chunk
            rest = target - tl.sum(tl.where(chunks < chunk, weight, 0.0), 0)
            rest = rest / tl.sum(tl.where(here, scale, 0.0), 0)
            own = tl.max(tl.where(here, peak, float("-inf")), 0)
            ids = chunk * CHUNK + tl.arange(0, CHUNK)
            x = load_logits(logits, at, stride, ids, width, GROUP)
            inner = weigh(x, own, inverse)
            if CUT:
                equal = x == tie
                passed = tl.sum(tl.where(chunks < chunk, tied, 0), 0)
                rank = tl.cumsum(equal.to(tl.int32), 0) - 1 + passed
                stays = (x > cut) | (equal & (rank < tl.load(kept_ties + at)))
                stays = stays & (weigh(x, top, inverse) >= tl.load(min_p + row))
                inner = tl.where(stays, inner, 0.0)
            inner = inner.to(tl.float64)
            token = _first_place(tl.cumsum(inner, 0), inner, ids, rest, width)
    tl.store(ids_out + at, tl.minimum(token, width - 1).to(tl.int64))


@dataclass(frozen=True)
class Scan:
    """What the chunks of each row say: [num_rows, num_chunks]."""

    logits: Tensor  # float32 [num_rows, width], the ids of a row side by side
    chunk: int
    peaks: Tensor  # float32
    places: Tensor  # int32
    sums: Tensor  # float64

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(stride, width, chunks of a row, greatest group of ids that divides width)."""
        width = self.logits.shape[1]
        group = min(16, width & -width)
        return self.logits.stride(0), width, self.peaks.shape[1], group


@dataclass(frozen=True)
class Cut:
    """Which tokens stay: those above the cut, and of those that equal the tie the first few."""

    values: Tensor  # float32 [num_rows, 2]: cut, tie (NaN: none)
    kept_ties: Tensor  # int32 [num_rows]
    ties: Tensor  # int32 [num_rows, num_chunks]: how many equal the tie
    min_p: Tensor  # float32, a column of the row table


def scan(
    logits: Tensor, rows: Tensor | None, temperature: Tensor | None, chunk: int = CHUNK
) -> Scan:
    """Look at every logit once; `temperature` None: nobody samples."""
    num_rows, width = logits.shape
    shape = (num_rows, triton.cdiv(width, chunk))
    peaks = torch.empty(shape, dtype=torch.float32, device=logits.device)
    places = torch.empty(shape, dtype=torch.int32, device=logits.device)
    sums = torch.empty(
        shape if temperature is not None else 0, dtype=torch.float64, device=logits.device
    )
    found = Scan(logits, chunk, peaks, places, sums)
    stride, width, num_chunks, group = found.shape
    _scan_kernel[(num_chunks, num_rows)](
        logits, rows, temperature, peaks, places, sums, stride, width, num_chunks,
        SUM=temperature is not None, CHUNK=chunk, GROUP=group, num_warps=8,
    )  # fmt: skip
    return found


def pick(
    found: Scan,
    noise: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: Tensor | None = None,
    cut: Cut | None = None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """From a scan to (ids int64, largest logits float32) [num_rows]. With a cut, `sums` are the
    weights above it."""
    num_rows = len(found.logits)
    ids = torch.empty(num_rows, dtype=torch.int64, device=found.logits.device)
    peaks = torch.empty(num_rows, dtype=torch.float32, device=found.logits.device)
    stride, width, num_chunks, group = found.shape
    _pick_kernel[(num_rows,)](
        found.logits, noise, rows, temperature, found.peaks, found.places,
        found.sums if sums is None else sums,
        cut and cut.values, cut and cut.min_p, cut and cut.ties, cut and cut.kept_ties,
        ids, peaks, stride, width, num_chunks,
        DRAW=temperature is not None, CUT=cut is not None,
        CHUNKS=triton.next_power_of_2(num_chunks), CHUNK=found.chunk, GROUP=group, num_warps=8,
    )  # fmt: skip
    return ids, peaks
