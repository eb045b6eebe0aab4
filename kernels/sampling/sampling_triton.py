"""Triton kernels of `sampling.py`, except the search of the cut, which is in `cut_triton.py`.

A row of logits is read in chunks of `CHUNK` ids, one program each, so that a single row keeps many
multiprocessors busy (`scan`). One program per row then combines the results of its chunks in a
fixed order (`pick`), so that no result depends on timing or on the rest of the batch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096


@triton.jit
def load_logits(logits, row, stride, ids, width, GROUP: tl.constexpr):
    """float32 logits of a row at `ids`; -inf after its end. `GROUP` divides width, so that the mask
    is the same for GROUP neighbours and loads can be wide."""
    inside = ids // GROUP < width // GROUP
    return tl.load(logits + row.to(tl.int64) * stride + ids, mask=inside, other=float("-inf"))


@triton.jit
def inverse_temperature(temperature, row):
    """1 / temperature, finite for the smallest one too. Not used for greedy rows."""
    return 1.0 / tl.maximum(tl.load(temperature + row), 1e-30)


@triton.jit
def weigh(x, top, inverse):
    """exp((x - top) / temperature), 0 for -inf, even if top is -inf."""
    top = tl.where(top == float("-inf"), 0.0, top)
    return tl.exp((x - top) * inverse)


@triton.jit
def _scan_kernel(
    logits, rows, temperature, peaks, peak_ids, sums, stride, width, num_chunks,
    SUM: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of one chunk: the largest logit (NaN if any is NaN), its id, the sum of weights."""
    chunk, at = tl.program_id(0), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits, at, stride, ids, width, GROUP)
    peak = tl.max(x, 0)
    peak_id = tl.min(tl.where(x == peak, ids, width - 1), 0)
    out = at * num_chunks + chunk
    tl.store(peak_ids + out, peak_id)
    tl.store(peaks + out, tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), peak))
    if SUM:
        inverse = inverse_temperature(temperature, tl.load(rows + at))
        tl.store(sums + out, tl.sum(weigh(x, peak, inverse).to(tl.float64), 0))


@triton.jit
def _first_above(running, weights, indices, target, LAST: tl.constexpr):
    """The first index of positive weight at which the running sum exceeds `target`. If rounding
    lets none exceed it, the last index of positive weight; 0 if all weights are 0 or NaN."""
    passes = (running > target) & (weights > 0)
    first = tl.min(tl.where(passes, indices, LAST), 0)
    last = tl.max(tl.where(weights > 0, indices, 0), 0)
    return tl.where(first == LAST, last, first)


@triton.jit
def _pick_kernel(
    logits, noise, rows, temperature, peaks, peak_ids, sums, cuts, min_p, ties, kept_ties,
    ids_out, peaks_out, stride, width, num_chunks,
    DRAW: tl.constexpr, CUT: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of one row: the largest logit and the chosen id: that of the largest logit or, if the row
    samples, that of the inverse CDF. First the chunk is chosen, then the id in it."""
    at = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS)
    is_chunk = chunks < num_chunks
    peak = tl.load(peaks + at * num_chunks + chunks, mask=is_chunk, other=float("-inf"))
    top = tl.max(peak, 0)
    is_bad = tl.max((peak != peak).to(tl.int32), 0) > 0
    tl.store(peaks_out + at, tl.where(is_bad, float("nan"), top))
    first = tl.min(tl.where(peak == top, chunks, num_chunks - 1), 0)
    token = tl.load(peak_ids + at * num_chunks + first)
    if DRAW:
        row = tl.load(rows + at)
        if tl.load(temperature + row) > 0:
            inverse = inverse_temperature(temperature, row)
            weight = tl.load(sums + at * num_chunks + chunks, mask=is_chunk, other=0.0)
            tied = tl.zeros((CHUNKS,), tl.int32)
            cut = float("-inf")
            tie = float("nan")
            if CUT:
                cut = tl.load(cuts + at * 2)
                tie = tl.load(cuts + at * 2 + 1)
                tied = tl.load(ties + at * num_chunks + chunks, mask=is_chunk, other=0)
                before = tl.cumsum(tied, 0) - tied
                kept = tl.minimum(tl.maximum(tl.load(kept_ties + at) - before, 0), tied)
                extra = tl.where(kept > 0, weigh(tie, peak, inverse), 0.0).to(tl.float64)
                weight += kept * extra
            scale = tl.where(peak == float("-inf"), 0.0, weigh(peak, top, inverse)).to(tl.float64)
            weight = weight * scale
            running = tl.cumsum(weight, 0)
            total = tl.max(running, 0)
            target = tl.minimum(tl.load(noise + at) * total, total * 0.9999999999999999)
            chunk = _first_above(running, weight, chunks, target, CHUNKS)
            is_chosen = chunks == chunk
            rest = target - tl.sum(tl.where(chunks < chunk, weight, 0.0), 0)
            rest = rest / tl.sum(tl.where(is_chosen, scale, 0.0), 0)
            chunk_peak = tl.max(tl.where(is_chosen, peak, float("-inf")), 0)
            ids = chunk * CHUNK + tl.arange(0, CHUNK)
            x = load_logits(logits, at, stride, ids, width, GROUP)
            inner = weigh(x, chunk_peak, inverse)
            if CUT:
                equal = x == tie
                passed = tl.sum(tl.where(chunks < chunk, tied, 0), 0)
                rank = tl.cumsum(equal.to(tl.int32), 0) - 1 + passed
                stays = (x > cut) | (equal & (rank < tl.load(kept_ties + at)))
                stays = stays & (weigh(x, top, inverse) >= tl.load(min_p + row))
                inner = tl.where(stays, inner, 0.0)
            inner = inner.to(tl.float64)
            token = _first_above(tl.cumsum(inner, 0), inner, ids, rest, width)
    tl.store(ids_out + at, tl.minimum(token, width - 1).to(tl.int64))


@dataclass(frozen=True)
class Scan:
    """The results of a scan for each chunk: three tensors [num_rows, num_chunks]."""

    logits: Tensor  # float32 [num_rows, width], strided over rows only
    chunk: int  # ids of a chunk
    peaks: Tensor  # float32: largest logit, NaN if any is NaN
    peak_ids: Tensor  # int32: its id
    sums: Tensor  # float64: sum of exp((logit - peak) / temperature); empty if no row samples

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(stride, width, chunks of a row, GROUP of `load_logits`)."""
        width = self.logits.shape[1]
        group = min(16, width & -width)
        return self.logits.stride(0), width, self.peaks.shape[1], group


@dataclass(frozen=True)
class Cut:
    """Which tokens are kept: those above the cut, and the first few of those that equal the tie."""

    values: Tensor  # float32 [num_rows, 2]: the cut and the tie, NaN for none
    kept_ties: Tensor  # int32 [num_rows]: how many of the tokens that equal the tie are kept
    ties: Tensor  # int32 [num_rows, num_chunks]: how many tokens equal the tie
    min_p: Tensor  # float32, a column of the row table


def scan(
    logits: Tensor, rows: Tensor | None, temperature: Tensor | None, chunk: int = CHUNK
) -> Scan:
    """Read every logit once. Arguments as for `draw`; without `temperature` no row samples, and
    `sums` stays empty."""
    num_rows, width = logits.shape
    shape = (num_rows, triton.cdiv(width, chunk))
    peaks = torch.empty(shape, dtype=torch.float32, device=logits.device)
    peak_ids = torch.empty(shape, dtype=torch.int32, device=logits.device)
    sums = torch.empty(
        shape if temperature is not None else 0, dtype=torch.float64, device=logits.device
    )
    scanned = Scan(logits, chunk, peaks, peak_ids, sums)
    stride, width, num_chunks, group = scanned.shape
    _scan_kernel[(num_chunks, num_rows)](
        logits, rows, temperature, peaks, peak_ids, sums, stride, width, num_chunks,
        SUM=temperature is not None, CHUNK=chunk, GROUP=group, num_warps=8,
    )  # fmt: skip
    return scanned


def pick(
    scanned: Scan,
    noise: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: Tensor | None = None,
    cut: Cut | None = None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the token of each row of a scan -> (ids int64, largest logits float32) [num_rows].

    Arguments as for `draw`; without `temperature` all rows are greedy. cut, sums: the results of
    `find_cut`, for `draw_truncated`.
    """
    num_rows = len(scanned.logits)
    ids = torch.empty(num_rows, dtype=torch.int64, device=scanned.logits.device)
    peaks = torch.empty(num_rows, dtype=torch.float32, device=scanned.logits.device)
    stride, width, num_chunks, group = scanned.shape
    _pick_kernel[(num_rows,)](
        scanned.logits, noise, rows, temperature, scanned.peaks, scanned.peak_ids,
        scanned.sums if sums is None else sums,
        cut and cut.values, cut and cut.min_p, cut and cut.ties, cut and cut.kept_ties,
        ids, peaks, stride, width, num_chunks,
        DRAW=temperature is not None, CUT=cut is not None,
        CHUNKS=triton.next_power_of_2(num_chunks), CHUNK=scanned.chunk, GROUP=group, num_warps=8,
    )  # fmt: skip
    return ids, peaks
