"""How the decode kernels share work: rows are cut into chunks, whose results are then merged.

A work item is a chunk of a row's tokens for a block of its columns (query tokens times heads).
Items are numbered by row, block, chunk; programs find theirs from `lengths` on the device. A
chunk's bounds depend on its row's own length and on the shape of the batch, never on the other
rows, so that a row's result does not change with its neighbours.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import pdl
from .mla_projections import expand_values
from .paged_rows import PagedRows

NOTHING = tl.constexpr(-1.0e30)  # maximum of a column that has seen no token
FUSED_TOKENS = 1  # of steps whose merge and up-projection are one launch: more read too much twice
LOG2E = 1.4426950408889634
_ALIGN = tl.constexpr(64)  # chunks are multiples of it
_UNIT = tl.constexpr(1024)  # length at which a row has its batch's least number of chunks
_LONG = tl.constexpr(2048)  # chunks of long rows, unless that makes more than the square root says
_MAX_CHUNKS = 128
_MAX_PARTIALS = 1024
# One compiled kernel serves all batches of about a size.
VARYING = ("num_rows", "least_chunks", "most_chunks", "table_stride", "max_columns")
MOVING = ("lengths",)  # a slice of a packed tensor: begins anywhere


@dataclass(frozen=True)
class SplitPlan:
    """How rows are cut and tiles are computed. Settled by the batch's shape alone."""

    columns: int  # query tokens times heads that one program takes
    blocks: int  # of columns, in the row with most queries
    least_chunks: int  # of a row of 1,024 tokens; longer rows get multiples of it
    most_chunks: int
    num_programs: int
    tile: int = 64  # tokens whose keys are copied to shared memory at a time
    num_warps: int = 4
    num_stages: int = 3


def plan_splits(
    num_rows: int, max_query_len: int, num_heads: int, max_length: int, num_sms: int
) -> SplitPlan:
    """As many chunks as fill the multiprocessors evenly, unless a chunk gets too small to pay."""
    wanted = max_query_len * num_heads
    columns = min(64, max(16, triton.next_power_of_2(wanted)))
    blocks = -(-wanted // columns)
    units = max(1, num_rows * blocks)
    tiles = 16  # of a row of 1,024 tokens
    costs = {}
    for chunks in range(1, tiles + 1):
        rounds = -(-units * chunks // num_sms)
        merge = 0.0 if chunks == 1 else 3 + 0.03 * units * chunks
        costs[chunks] = rounds * (-(-tiles // chunks) * 3.5 + 5) + merge  # us on an H100
    chunks = min(costs, key=lambda n: (costs[n], n))
    most = max(4, min(_MAX_CHUNKS, _MAX_PARTIALS // units)) if units <= 512 else 1
    most = min(most, max(1, -(-max_length // 64)))
    least = most if units == 1 else min(chunks, most)
    programs = min(num_sms, units * most)
    wide = {"tile": 32, "num_warps": 8} if columns > 32 else {}
    return SplitPlan(columns, blocks, least, most, programs, **wide)


@triton.jit
def _chunk_size(lengths, least_chunks, most_chunks):
    """Tokens per chunk of rows of these lengths, a multiple of the tile."""
    growth = tl.sqrt((lengths // _UNIT).to(tl.float32)).to(tl.int32)
    growth = tl.minimum(growth, lengths // (_LONG * least_chunks))
    chunks = tl.minimum(least_chunks * tl.maximum(growth, 1), most_chunks)
    tokens = (lengths + chunks - 1) // chunks
    return tl.maximum((tokens + _ALIGN - 1) // _ALIGN * _ALIGN, _ALIGN)


@triton.jit
def row_work(
    row_ids, query_starts, lengths, num_rows, num_heads, least_chunks, most_chunks, COLUMNS
):
    """-> of every row of the batch: length, first token, tokens, chunks, work items."""
    real = row_ids < num_rows
    length = tl.load(lengths + row_ids, mask=real, other=1).to(tl.int32)
    starts = tl.load(query_starts + row_ids, mask=real, other=0).to(tl.int32)
    ends = tl.load(query_starts + row_ids + 1, mask=real, other=0).to(tl.int32)
    size = _chunk_size(length, least_chunks, most_chunks)
    chunks = tl.maximum((length + size - 1) // size, 1)
    blocks = ((ends - starts) * num_heads + COLUMNS - 1) // COLUMNS
    return length, starts, ends - starts, chunks, tl.where(real, blocks * chunks, 0)


@triton.jit
def find_item(item, row_ids, rows, item_ends, least_chunks, most_chunks):
    """-> row, its first token, tokens, length and chunks, block of columns, chunk's bounds.
    `rows`: what `row_work` returns."""
    lengths, starts, counts, chunks, work = rows
    row = tl.sum((item_ends <= item).to(tl.int32), 0)
    mine = row_ids == row
    length = tl.sum(tl.where(mine, lengths, 0), 0)
    start = tl.sum(tl.where(mine, starts, 0), 0)
    count = tl.sum(tl.where(mine, counts, 0), 0)
    num_chunks = tl.sum(tl.where(mine, chunks, 0), 0)
    before = tl.sum(tl.where(row_ids < row, work, 0), 0)
    size = _chunk_size(length, least_chunks, most_chunks)
    block = (item - before) // num_chunks
    first = (item - before) % num_chunks * size
    return row, start, count, length, num_chunks, block, first, tl.minimum(first + size, length)


def partial_results(plan: SplitPlan, max_columns: int, num_rows: int, out: Tensor) -> list[Tensor]:
    """-> room for chunks' results [n, value_dim], maxima [n] and sums [n], float32; empty if no
    row is cut."""
    cut = plan.most_chunks > 1
    count = num_rows * plan.blocks * plan.most_chunks * min(plan.columns, max_columns) * cut
    partial = torch.empty(count, out.shape[2], dtype=torch.float32, device=out.device)
    return [partial, *torch.empty(2, count, dtype=torch.float32, device=out.device)]


def rows_bound(num_rows: int) -> int:
    """Power of two that kernels are compiled for."""
    small = next((n for n in (16, 128) if num_rows <= n), None)
    return small or triton.next_power_of_2(num_rows)


@triton.jit
def _merge_chunks(partials, line, step, num_chunks, value_ids, inside, value_dim, STEP):
    """-> the values [BLOCK] of a column, whose first chunk's results are at `line`."""
    partial, partial_max, partial_sum = partials
    chunk_ids = tl.arange(0, STEP)
    peak = tl.full([1], NOTHING, tl.float32)
    weight = tl.zeros([1], tl.float32)
    acc = tl.zeros(value_ids.shape, tl.float32)
    for first in range(0, num_chunks, STEP):
        real = first + chunk_ids < num_chunks
        lines = line + (first + chunk_ids).to(tl.int64) * step
        peaks = tl.load(partial_max + lines, mask=real, other=NOTHING)
        sums = tl.load(partial_sum + lines, mask=real, other=0.0)
        values = tl.load(
            partial + lines[:, None] * value_dim + value_ids[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        shrink = tl.exp2(peak - new_peak)
        factors = tl.exp2(peaks - new_peak)
        weight = weight * shrink + tl.sum(factors * sums, 0)
        acc = acc * shrink + tl.sum(values * factors[:, None], 0)
        peak = new_peak
    return acc / tl.maximum(weight, 1e-37)


@triton.jit
def _find_token(token, row_ids, rows, num_rows, num_heads):
    """-> chunks of a query token's row, its first column in the row, work items of rows before."""
    _, starts, counts, chunks, work = rows
    real = row_ids < num_rows
    mine = real & (starts <= token) & (token < starts + counts)
    num_chunks = tl.sum(tl.where(mine, chunks, 0), 0)
    first_column = (token - tl.sum(tl.where(mine, starts, 0), 0)) * num_heads
    before = tl.sum(tl.where(real & (starts + counts <= token), work, 0), 0)
    return num_chunks, first_column, before


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=MOVING)
def _merge_kernel(
    partials,
    query_starts,
    lengths,
    out,
    num_rows,
    least_chunks,
    most_chunks,
    num_heads,
    max_columns,
    value_dim,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """A query token and HEADS of its heads, BLOCK of the values: sum the chunks, each by its own
    maximum."""
    token = tl.program_id(0)
    row_ids = tl.arange(0, ROWS)
    rows = row_work(
        row_ids, query_starts, lengths, num_rows, num_heads, least_chunks, most_chunks, COLUMNS
    )
    found = _find_token(token, row_ids, rows, num_rows, num_heads)
    num_chunks, first_column, before = found
    if PDL:  # so far, it read nothing that the kernel before it wrote
        gdc_wait()
        gdc_launch_dependents()
    if num_chunks > 1:
        step = tl.minimum(max_columns, COLUMNS)
        value_ids = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        inside = value_ids < value_dim
        first_head = tl.program_id(1) * HEADS
        for head in range(first_head, tl.minimum(first_head + HEADS, num_heads)):
            column = first_column + head
            place = before + column // COLUMNS * num_chunks
            line = place.to(tl.int64) * step + column % COLUMNS
            result = _merge_chunks(
                partials, line, step, num_chunks, value_ids, inside, value_dim, STEP
            )
            line_out = (token * num_heads + head).to(tl.int64) * value_dim
            tl.store(out + line_out + value_ids, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=MOVING)
def _merge_expand_kernel(
    partials,
    query_starts,
    lengths,
    merged,
    w_uv,
    out,
    num_rows,
    least_chunks,
    most_chunks,
    num_heads,
    max_columns,
    value_dim,
    num_out,
    w_strides,
    COLUMNS: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """A query token and head: sum the chunks (rows that were not cut are in `merged`), then OUT
    outputs of the up-projection."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    row_ids = tl.arange(0, ROWS)
    value_ids = tl.arange(0, BLOCK)
    out_ids = tl.program_id(2) * OUT + tl.arange(0, OUT)
    inside = value_ids < value_dim
    w = tl.load(
        w_uv + head * w_strides[0] + out_ids[:, None] * w_strides[1] + value_ids[None, :],
        mask=(out_ids < num_out)[:, None] & inside[None, :],
        other=0.0,
    )
    rows = row_work(
        row_ids, query_starts, lengths, num_rows, num_heads, least_chunks, most_chunks, COLUMNS
    )
    num_chunks, column, before = _find_token(token, row_ids, rows, num_rows, num_heads)
    if PDL:  # so far, it read nothing that the kernel before it wrote
        gdc_wait()
        gdc_launch_dependents()
    column += head
    line_out = (token * num_heads + head).to(tl.int64)
    if num_chunks > 1:
        step = tl.minimum(max_columns, COLUMNS)
        line = (before + column // COLUMNS * num_chunks).to(tl.int64) * step + column % COLUMNS
        latent = _merge_chunks(partials, line, step, num_chunks, value_ids, inside, value_dim, STEP)
        latent = latent.to(merged.dtype.element_ty)
    else:
        latent = tl.load(merged + line_out * value_dim + value_ids, mask=inside, other=0.0)
    result = tl.sum(w.to(tl.float32) * latent.to(tl.float32)[None, :], 1)
    place = out + line_out * num_out + out_ids
    tl.store(place, result.to(out.dtype.element_ty), mask=out_ids < num_out)


def launch_merge(
    partials: list[Tensor],
    rows: PagedRows,
    out: Tensor,
    plan: SplitPlan,
    w_uv: Tensor | None,
    expanded: Tensor | None,
) -> Tensor:
    """Merge the chunks of the rows that were cut.

    out [num_tokens, heads, value_dim], contiguous, holds the results of the rows that were not cut
    and receives those of the others
    -> out; with w_uv [heads, v_dim, value_dim] its up-projection [num_tokens, heads, v_dim], in
    `expanded` if given.
    """
    is_cut = plan.most_chunks > 1
    if is_cut and w_uv is not None and len(out) <= FUSED_TOKENS:
        return _launch_merge_expand(partials, rows, out, plan, w_uv, expanded)
    if is_cut:
        _launch_merge_chunks(partials, rows, out, plan)
    return out if w_uv is None else expand_values(out, w_uv, expanded)


def _launch_merge_expand(
    partials: list[Tensor],
    rows: PagedRows,
    merged: Tensor,
    plan: SplitPlan,
    w_uv: Tensor,
    out: Tensor | None,
) -> Tensor:
    num_tokens, num_heads, value_dim = merged.shape
    num_rows = len(rows.lengths)
    num_out = w_uv.shape[1]
    if out is None:
        out = merged.new_empty(num_tokens, num_heads, num_out)
    outputs = 32  # of a program
    _merge_expand_kernel[(num_tokens, num_heads, -(-num_out // outputs))](
        tuple(partials),
        rows.query_starts,
        rows.lengths,
        merged,
        w_uv,
        out,
        num_rows,
        plan.least_chunks,
        plan.most_chunks,
        num_heads,
        rows.max_query_len * num_heads,
        value_dim,
        num_out,
        w_uv.stride()[:2],
        COLUMNS=plan.columns,
        OUT=outputs,
        BLOCK=triton.next_power_of_2(value_dim),
        ROWS=rows_bound(num_rows),
        STEP=16,
        num_warps=8,
        **pdl(),
    )
    return out


def _launch_merge_chunks(
    partials: list[Tensor], rows: PagedRows, out: Tensor, plan: SplitPlan
) -> None:
    num_tokens, num_heads, value_dim = out.shape
    num_rows = len(rows.lengths)
    is_few = num_tokens <= 8
    heads = 1 if is_few else 4  # of a program
    block = min(128 if is_few else 512, triton.next_power_of_2(value_dim))
    _merge_kernel[(num_tokens, -(-num_heads // heads), -(-value_dim // block))](
        tuple(partials),
        rows.query_starts,
        rows.lengths,
        out,
        num_rows,
        plan.least_chunks,
        plan.most_chunks,
        num_heads,
        rows.max_query_len * num_heads,
        value_dim,
        COLUMNS=plan.columns,
        HEADS=heads,
        BLOCK=block,
        ROWS=rows_bound(num_rows),
        STEP=16,
        num_warps=4,
        **pdl(),
    )
