"""Triton kernels of `mla_decode.py`: attention over pages cut into chunks, then a merge.

A program takes some columns (query tokens times heads) of one row. A tile of keys is loaded once;
its leading part serves as the values. The output is accumulated transposed, values times columns,
so that its large side is the one that tensor cores want large.

Programs find their work from `lengths` on the device: a chunk's bounds depend on its row's own
length and on the shape of the batch, never on the other rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import pdl

_ALIGN = tl.constexpr(64)  # chunks are multiples of it
_UNIT = tl.constexpr(1024.0)  # length at which a row has its batch's least number of chunks
_NOTHING = tl.constexpr(-1.0e30)  # maximum of a column that has seen no token
_MAX_CHUNKS = 128
_MAX_PARTIALS = 1024
_LOG2E = 1.4426950408889634
# One compiled kernel serves all batches of about a size.
_VARYING = ("num_rows", "most_chunks", "table_stride", "max_columns")


@dataclass(frozen=True)
class SplitPlan:
    """How rows are cut and tiles are computed. Settled by the batch's shape alone."""

    columns: int  # query tokens times heads that one program takes
    blocks: int  # of columns, in the row with most queries
    least_chunks: float  # of a row of 1,024 tokens; longer rows get more, with the square root
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
    for chunks in (1, 2, 4, 8, 16):
        rounds = -(-units * chunks // num_sms)
        merge = 0.0 if chunks == 1 else 0.01 * units * chunks
        costs[chunks] = rounds * (tiles / chunks * 3.25 + 2.5) + merge  # microseconds on an H100
    chunks = min(costs, key=lambda n: (costs[n], n))
    most = max(4, min(_MAX_CHUNKS, _MAX_PARTIALS // units)) if units <= 512 else 1
    most = min(most, max(1, -(-max_length // 64)))
    least = float(most) if units == 1 else float(min(chunks, most))
    programs = min(num_sms, units * most)
    wide = {"tile": 32, "num_warps": 8} if columns > 32 else {}
    return SplitPlan(columns, blocks, least, most, programs, **wide)


@triton.jit
def _chunk_size(lengths, least_chunks, most_chunks):
    """Tokens per chunk of rows of these lengths, a multiple of the tile."""
    grown = least_chunks * tl.sqrt(tl.maximum(lengths.to(tl.float32) / _UNIT, 1.0))
    chunks = tl.minimum(tl.maximum(grown.to(tl.int32), 1), most_chunks)
    tokens = (lengths + chunks - 1) // chunks
    return (tokens + _ALIGN - 1) // _ALIGN * _ALIGN


@triton.jit
def _num_chunks(lengths, least_chunks, most_chunks):
    size = tl.maximum(_chunk_size(lengths, least_chunks, most_chunks), 1)
    return tl.maximum((lengths + size - 1) // size, 1)


@triton.jit(do_not_specialize=_VARYING)
def _attend_kernel(
    queries,
    kv,
    page_table,
    query_starts,
    lengths,
    out,
    partial,
    partial_max,
    partial_sum,
    num_rows,
    least_chunks,
    most_chunks,
    scale,
    kv_page_stride,
    kv_token_stride,
    table_stride,
    num_heads,
    max_columns,
    value_dim,
    latent_dim,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Everybody's work: a row has its blocks of columns times its chunks of tokens.
    row_ids = tl.arange(0, ROWS)
    real = row_ids < num_rows
    all_lengths = tl.load(lengths + row_ids, mask=real, other=1).to(tl.int32)
    all_starts = tl.load(query_starts + row_ids, mask=real, other=0).to(tl.int32)
    all_ends = tl.load(query_starts + row_ids + 1, mask=real, other=0).to(tl.int32)
    all_chunks = _num_chunks(all_lengths, least_chunks, most_chunks)
    all_columns = (all_ends - all_starts) * num_heads
    work = tl.where(real, (all_columns + COLUMNS - 1) // COLUMNS * all_chunks, 0)
    ends = tl.cumsum(work, 0)
    total = tl.sum(work, 0)

    value_ids = tl.arange(0, VALUE)
    rope_ids = tl.arange(0, ROPE)
    column_ids = tl.arange(0, COLUMNS)
    tile_ids = tl.arange(0, TILE)
    is_value = value_ids < value_dim
    is_rope = rope_ids < latent_dim - value_dim
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        row = tl.sum((ends <= item).to(tl.int32), 0)
        mine = row_ids == row
        length = tl.sum(tl.where(mine, all_lengths, 0), 0)
        start = tl.sum(tl.where(mine, all_starts, 0), 0)
        num_queries = tl.sum(tl.where(mine, all_ends - all_starts, 0), 0)
        num_chunks = tl.sum(tl.where(mine, all_chunks, 0), 0)
        before = tl.sum(tl.where(row_ids < row, work, 0), 0)
        size = _chunk_size(length, least_chunks, most_chunks)
        block = (item - before) // num_chunks
        first = (item - before) % num_chunks * size
        last = tl.minimum(first + size, length)

        columns = block * COLUMNS + column_ids
        is_column = columns < num_queries * num_heads
        token = start.to(tl.int64) + columns // num_heads
        seen = length - num_queries + 1 + columns // num_heads  # tokens the column's query sees
        line = (token * num_heads + columns % num_heads) * latent_dim
        q_value = tl.load(
            queries + line[:, None] + value_ids[None, :],
            mask=is_column[:, None] & is_value[None, :],
            other=0.0,
        )
        q_rope = tl.load(
            queries + line[:, None] + value_dim + rope_ids[None, :],
            mask=is_column[:, None] & is_rope[None, :],
            other=0.0,
        )
        peak = tl.full([COLUMNS], _NOTHING, tl.float32)
        weight = tl.zeros([COLUMNS], tl.float32)
        acc = tl.zeros([VALUE, COLUMNS], tl.float32)
        table = page_table + row.to(tl.int64) * table_stride
        # Page numbers are read one tile ahead, so that copies of keys need not wait for them.
        if PAGE % TILE == 0:
            pages = tl.load(table + first // PAGE)
        else:
            pages = tl.load(
                table + (first + tile_ids) // PAGE, mask=first + tile_ids < last, other=0
            )
        for begin in tl.range(first, last, TILE, num_stages=STAGES):
            tokens = begin + tile_ids
            inside = tokens < last
            lines = pages.to(tl.int64) * kv_page_stride + (tokens % PAGE) * kv_token_stride
            if PAGE % TILE == 0:
                following = tl.minimum(begin + TILE, last - 1)
                pages = tl.load(table + following // PAGE)
            else:
                pages = tl.load(table + (tokens + TILE) // PAGE, mask=tokens + TILE < last, other=0)
            latent = tl.load(
                kv + lines[:, None] + value_ids[None, :],
                mask=inside[:, None] & is_value[None, :],
                other=0.0,
            )
            rope = tl.load(
                kv + lines[:, None] + value_dim + rope_ids[None, :],
                mask=inside[:, None] & is_rope[None, :],
                other=0.0,
            )
            scores = tl.dot(q_rope, tl.trans(rope))
            scores = tl.dot(q_value, tl.trans(latent), scores)
            visible = inside[None, :] & (tokens[None, :] < seen[:, None])
            scores = tl.where(visible, scores * scale, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp2(peak - new_peak)
            p = tl.exp2(scores - new_peak[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            acc = tl.dot(tl.trans(latent), tl.trans(p.to(latent.dtype)), acc * shrink[None, :])
            peak = new_peak

        total_weight = weight
        place = is_column[None, :] & is_value[:, None]
        if num_chunks == 1:
            lines = (token * num_heads + columns % num_heads) * value_dim
            result = acc / tl.maximum(total_weight, 1e-37)[None, :]
            tl.store(
                out + lines[None, :] + value_ids[:, None],
                result.to(out.dtype.element_ty),
                mask=place,
            )
        else:
            # Items are numbered by row, block of columns, chunk.
            lines = (item * tl.minimum(max_columns, COLUMNS) + column_ids).to(tl.int64)
            tl.store(partial_max + lines, peak, mask=is_column)
            tl.store(partial_sum + lines, total_weight, mask=is_column)
            tl.store(partial + lines[None, :] * value_dim + value_ids[:, None], acc, mask=place)


@triton.jit(do_not_specialize=_VARYING)
def _merge_kernel(
    partial,
    partial_max,
    partial_sum,
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
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0)
    row_ids = tl.arange(0, ROWS)
    real = row_ids < num_rows
    starts = tl.load(query_starts + row_ids, mask=real, other=0).to(tl.int32)
    ends = tl.load(query_starts + row_ids + 1, mask=real, other=0).to(tl.int32)
    all_lengths = tl.load(lengths + row_ids, mask=real, other=1).to(tl.int32)
    chunks = _num_chunks(all_lengths, least_chunks, most_chunks)
    work = tl.where(real, ((ends - starts) * num_heads + COLUMNS - 1) // COLUMNS * chunks, 0)
    mine = real & (starts <= token) & (token < ends)
    num_chunks = tl.sum(tl.where(mine, chunks, 0), 0)
    if num_chunks > 1:
        first_column = (token - tl.sum(tl.where(mine, starts, 0), 0)) * num_heads
        before = tl.sum(tl.where(real & (ends <= token), work, 0), 0)
        step = tl.minimum(max_columns, COLUMNS)
        value_ids = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        inside = value_ids < value_dim
        chunk_ids = tl.arange(0, STEP)
        first_head = tl.program_id(1) * HEADS
        for head in range(first_head, tl.minimum(first_head + HEADS, num_heads)):
            column = first_column + head
            place = before + column // COLUMNS * num_chunks
            line = place.to(tl.int64) * step + column % COLUMNS
            peak = tl.full([1], _NOTHING, tl.float32)
            weight = tl.zeros([1], tl.float32)
            acc = tl.zeros([BLOCK], tl.float32)
            for first in range(0, num_chunks, STEP):
                real_chunk = first + chunk_ids < num_chunks
                lines = line + (first + chunk_ids).to(tl.int64) * step
                peaks = tl.load(partial_max + lines, mask=real_chunk, other=_NOTHING)
                sums = tl.load(partial_sum + lines, mask=real_chunk, other=0.0)
                values = tl.load(
                    partial + lines[:, None] * value_dim + value_ids[None, :],
                    mask=real_chunk[:, None] & inside[None, :],
                    other=0.0,
                )
                new_peak = tl.maximum(peak, tl.max(peaks, 0))
                shrink = tl.exp2(peak - new_peak)
                factors = tl.exp2(peaks - new_peak)
                weight = weight * shrink + tl.sum(factors * sums, 0)
                acc = acc * shrink + tl.sum(values * factors[:, None], 0)
                peak = new_peak
            result = acc / tl.maximum(weight, 1e-37)
            line_out = (token * num_heads + head).to(tl.int64) * value_dim
            tl.store(out + line_out + value_ids, result.to(out.dtype.element_ty), mask=inside)


def launch_mla_decode(
    queries: Tensor,
    kv: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    max_query_len: int,
    value_dim: int,
    scale: float,
    plan: SplitPlan,
) -> Tensor:
    """`mla_decode`, bfloat16 or float16 (any float under the interpreter)."""
    num_tokens, num_heads, latent_dim = queries.shape
    num_rows = len(lengths)
    out = queries.new_empty(num_tokens, num_heads, value_dim)
    if not num_tokens:
        return out
    max_columns = min(plan.columns, max_query_len * num_heads)
    count = num_rows * plan.blocks * plan.most_chunks * max_columns if plan.most_chunks > 1 else 0
    partial = torch.empty(count, value_dim, dtype=torch.float32, device=out.device)
    peaks, sums = torch.empty(2, count, dtype=torch.float32, device=out.device)
    rows = next((n for n in (16, 128) if num_rows <= n), triton.next_power_of_2(num_rows))
    splits = (plan.least_chunks, plan.most_chunks)
    _attend_kernel[(plan.num_programs,)](
        queries,
        kv,
        page_table,
        query_starts,
        lengths,
        out,
        partial,
        peaks,
        sums,
        num_rows,
        *splits,
        scale * _LOG2E,
        kv.stride(0),
        kv.stride(1),
        page_table.stride(0),
        num_heads,
        max_columns,
        value_dim,
        latent_dim,
        PAGE=kv.shape[1],
        TILE=plan.tile,
        COLUMNS=plan.columns,
        VALUE=triton.next_power_of_2(value_dim),
        ROPE=max(16, triton.next_power_of_2(latent_dim - value_dim)),
        ROWS=rows,
        STAGES=plan.num_stages,
        num_warps=plan.num_warps,
        **pdl(),
    )
    if count:
        few = num_tokens <= 8
        heads = 1 if few else 4
        block = min(128 if few else 512, triton.next_power_of_2(value_dim))
        _merge_kernel[(num_tokens, -(-num_heads // heads), -(-value_dim // block))](
            partial,
            peaks,
            sums,
            query_starts,
            lengths,
            out,
            num_rows,
            *splits,
            num_heads,
            max_columns,
            value_dim,
            COLUMNS=plan.columns,
            HEADS=heads,
            BLOCK=block,
            ROWS=rows,
            STEP=16,
            num_warps=4,
            **pdl(),
        )
    return out
