"""How the decode kernels share work: rows are cut into chunks, and the chunks' results are merged.

A column is a query token and a head: queries [num_tokens, heads, latent_dim] of a row are count *
heads columns. A work item is a chunk of a row's tokens for a block of its columns. Items are
numbered by row, block and chunk. Programs compute which item they have from `lengths` on the
device, so that a CUDA graph follows the lengths. Example: 16 heads, blocks of 16 columns, and
`least_chunks` = 2; row 0 has 200 tokens and 1 query, row 1 has 70 tokens and 2 queries.

    row   tokens of a chunk (rounded up to 64)   chunks   blocks   items   item_ends
    0     200 / 2 -> 128                         2        1        2       2
    1     70 / 2 -> 64                           2        2        4       6

    item     0        1          2       3        4       5
    row      0        0          1       1        1       1
    block    0        0          0       0        1       1
    chunk    0        1          0       1        0       1
    tokens   0..127   128..199   0..63   64..69   0..63   64..69

The bounds of a chunk depend on the length of its row and on the shape of the batch, not on the
other rows. So the result of a row does not depend on its neighbours. Each chunk leaves its maximum,
its sum of exponentials and its weighted values; the merge scales them to the common maximum.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import pdl
from .mla_projections import expand_values
from .paged_rows import PagedRows

NOTHING = tl.constexpr(-1.0e30)  # maximum of a column that has seen no token
# Up to so many tokens, merge and up-projection are one launch. With more, too many programs would
# read the same partial results.
FUSED_TOKENS = 1
LOG2E = 1.4426950408889634  # kernels compute powers of 2
_ALIGN = tl.constexpr(64)  # the tokens of a chunk are a multiple of it
_UNIT = tl.constexpr(1024)  # rows of up to about this length have `least_chunks` chunks
_LONG = tl.constexpr(2048)  # tokens of each chunk, at least, in a row with more than `least_chunks`
_MAX_CHUNKS = 128  # of a row
_MAX_PARTIALS = 1024  # items of all rows together, or 4 chunks a row if that is more
# Kernel arguments that Triton must not specialize on: one compiled kernel serves all batches of
# about a size.
VARYING = ("num_rows", "least_chunks", "most_chunks", "table_stride", "max_columns")
MOVING = ("lengths",)  # nor on its alignment: a slice of a packed tensor


@dataclass(frozen=True)
class SplitPlan:
    """How rows are cut and how tiles are computed. Depends on the shape of the batch only."""

    columns: int  # of a block
    blocks: int  # of the row with the most queries
    least_chunks: int  # of a row of up to 1,024 tokens; longer rows get multiples of it
    most_chunks: int  # of any row
    num_programs: int
    tile: int = 64  # tokens whose latents are copied to shared memory at a time
    num_warps: int = 4
    num_stages: int = 3


@lru_cache(maxsize=256)  # all layers of a step ask for the same plan
def plan_splits(
    num_rows: int, max_query_len: int, num_heads: int, max_length: int, num_sms: int
) -> SplitPlan:
    """The number of chunks that is fastest for rows of 1,024 tokens, by a model of the time on an
    H100. More chunks fill the multiprocessors more evenly but cost more to start and to merge."""
    max_columns = max_query_len * num_heads
    columns = min(64, max(16, triton.next_power_of_2(max_columns)))
    blocks = -(-max_columns // columns)
    units = max(1, num_rows * blocks)
    tiles = 16  # of a row of 1,024 tokens
    costs = {}  # us
    for chunks in range(1, tiles + 1):
        rounds = -(-units * chunks // num_sms)
        merge = 0.0 if chunks == 1 else 3 + 0.03 * units * chunks
        costs[chunks] = rounds * (-(-tiles // chunks) * 3.5 + 5) + merge
    chunks = min(costs, key=lambda n: (costs[n], n))
    most = max(4, min(_MAX_CHUNKS, _MAX_PARTIALS // units)) if units <= 512 else 1
    most = min(most, max(1, -(-max_length // 64)))
    least = most if units == 1 else min(chunks, most)
    programs = min(num_sms, units * most)
    wide = {"tile": 32, "num_warps": 8} if columns > 32 else {}
    return SplitPlan(columns, blocks, least, most, programs, **wide)


@triton.jit
def _chunk_size(lengths, least_chunks, most_chunks):
    """Tokens in a chunk of rows of these lengths, a multiple of 64.

    The number of chunks grows with the square root of the length, so that the time to compute a
    chunk and the time to merge all of them grow alike.
    """
    growth = tl.sqrt((lengths // _UNIT).to(tl.float32)).to(tl.int32)
    growth = tl.minimum(growth, lengths // (_LONG * least_chunks))
    chunks = tl.minimum(least_chunks * tl.maximum(growth, 1), most_chunks)
    tokens = (lengths + chunks - 1) // chunks
    return tl.maximum((tokens + _ALIGN - 1) // _ALIGN * _ALIGN, _ALIGN)


@triton.jit
def row_work(
    row_ids, query_starts, lengths, num_rows, num_heads, least_chunks, most_chunks, COLUMNS
):
    """-> for every row of the batch: length, first query, queries, chunks, work items."""
    is_row = row_ids < num_rows
    length = tl.load(lengths + row_ids, mask=is_row, other=1).to(tl.int32)
    starts = tl.load(query_starts + row_ids, mask=is_row, other=0).to(tl.int32)
    ends = tl.load(query_starts + row_ids + 1, mask=is_row, other=0).to(tl.int32)
    size = _chunk_size(length, least_chunks, most_chunks)
    chunks = tl.maximum((length + size - 1) // size, 1)
    blocks = ((ends - starts) * num_heads + COLUMNS - 1) // COLUMNS
    return length, starts, ends - starts, chunks, tl.where(is_row, blocks * chunks, 0)


@triton.jit
def find_item(item, row_ids, rows, item_ends, least_chunks, most_chunks):
    """Decode the number of a work item, as in the example above.

    rows: the results of `row_work`; item_ends: the running sum of its work items
    -> row, the row's first query, queries, length and chunks, block of columns, first token of the
    chunk and the one after its last.
    """
    lengths, starts, counts, chunks, work = rows
    row = tl.sum((item_ends <= item).to(tl.int32), 0)
    is_item_row = row_ids == row
    length = tl.sum(tl.where(is_item_row, lengths, 0), 0)
    start = tl.sum(tl.where(is_item_row, starts, 0), 0)
    count = tl.sum(tl.where(is_item_row, counts, 0), 0)
    num_chunks = tl.sum(tl.where(is_item_row, chunks, 0), 0)
    before = tl.sum(tl.where(row_ids < row, work, 0), 0)
    size = _chunk_size(length, least_chunks, most_chunks)
    block = (item - before) // num_chunks
    first = (item - before) % num_chunks * size
    return row, start, count, length, num_chunks, block, first, tl.minimum(first + size, length)


def partial_results(plan: SplitPlan, max_columns: int, num_rows: int, out: Tensor) -> list[Tensor]:
    """Allocate what chunks leave for the merge: weighted values [n, value_dim], maxima [n] and sums
    of exponentials [n], float32, for n columns of items. Empty if no row is cut."""
    is_cut = plan.most_chunks > 1
    count = num_rows * plan.blocks * plan.most_chunks * min(plan.columns, max_columns) * is_cut
    partial = torch.empty(count, out.shape[2], dtype=torch.float32, device=out.device)
    return [partial, *torch.empty(2, count, dtype=torch.float32, device=out.device)]


def rows_bound(num_rows: int) -> int:
    """The number of rows that kernels are compiled for, a power of two."""
    small = next((n for n in (16, 128) if num_rows <= n), None)
    return small or triton.next_power_of_2(num_rows)


@triton.jit
def _merge_chunks(partials, line, step, num_chunks, value_ids, inside, value_dim, STEP):
    """-> the values [BLOCK] of a column. The results of its first chunk are at index `line` of the
    partial results, those of the next one `step` further on."""
    partial, partial_max, partial_sum = partials
    chunk_ids = tl.arange(0, STEP)
    peak = tl.full([1], NOTHING, tl.float32)
    weight = tl.zeros([1], tl.float32)
    acc = tl.zeros(value_ids.shape, tl.float32)
    for first in range(0, num_chunks, STEP):
        is_chunk = first + chunk_ids < num_chunks
        lines = line + (first + chunk_ids).to(tl.int64) * step
        peaks = tl.load(partial_max + lines, mask=is_chunk, other=NOTHING)
        sums = tl.load(partial_sum + lines, mask=is_chunk, other=0.0)
        values = tl.load(
            partial + lines[:, None] * value_dim + value_ids[None, :],
            mask=is_chunk[:, None] & inside[None, :],
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
    """-> chunks of the row of a query token, the token's first column in the row, number of work
    items of the rows before."""
    _, starts, counts, chunks, work = rows
    is_row = row_ids < num_rows
    is_token_row = is_row & (starts <= token) & (token < starts + counts)
    num_chunks = tl.sum(tl.where(is_token_row, chunks, 0), 0)
    first_column = (token - tl.sum(tl.where(is_token_row, starts, 0), 0)) * num_heads
    before = tl.sum(tl.where(is_row & (starts + counts <= token), work, 0), 0)
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
    """Merge the chunks of a query token, for HEADS of its heads and BLOCK of the values."""
    token = tl.program_id(0)
    row_ids = tl.arange(0, ROWS)
    rows = row_work(
        row_ids, query_starts, lengths, num_rows, num_heads, least_chunks, most_chunks, COLUMNS
    )
    num_chunks, first_column, before = _find_token(token, row_ids, rows, num_rows, num_heads)
    if PDL:  # nothing read so far is written by the kernel before
        gdc_wait()
        gdc_launch_dependents()
    if num_chunks > 1:
        step = tl.minimum(max_columns, COLUMNS)
        value_ids = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        inside = value_ids < value_dim
        first_head = tl.program_id(1) * HEADS
        for head in range(first_head, tl.minimum(first_head + HEADS, num_heads)):
            column = first_column + head
            item = before + column // COLUMNS * num_chunks
            line = item.to(tl.int64) * step + column % COLUMNS
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
    """Merge the chunks of a query token and head, then compute OUT outputs of the up-projection.
    The results of rows that were not cut are in `merged`."""
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
    if PDL:  # nothing read so far is written by the kernel before
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
    target = out + line_out * num_out + out_ids
    tl.store(target, result.to(out.dtype.element_ty), mask=out_ids < num_out)


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
