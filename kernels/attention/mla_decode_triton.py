"""Triton kernel of `mla_decode.py`: attention over rows cut into chunks (`mla_decode_split.py`).

A tile of latents is loaded once: all of it is the keys, its leading part the values. The output is
accumulated transposed, values times columns, because tensor cores want their first side large.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import pdl
from .mla_decode_split import (
    LOG2E,
    MOVING,
    NOTHING,
    VARYING,
    SplitPlan,
    find_item,
    launch_merge,
    partial_results,
    row_work,
    rows_bound,
)
from .mla_projections import expand_values
from .paged_rows import PagedRows


@triton.jit
def _load_lines(
    base, lines, is_real, value_dim, latent_dim, VALUE: tl.constexpr, ROPE: tl.constexpr
):
    """-> value part [n, VALUE] and rotary part [n, ROPE] of the latents at base + lines [n]."""
    value_ids = tl.arange(0, VALUE)
    rope_ids = tl.arange(0, ROPE)
    value = tl.load(
        base + lines[:, None] + value_ids[None, :],
        mask=is_real[:, None] & (value_ids < value_dim)[None, :],
        other=0.0,
    )
    rope = tl.load(
        base + lines[:, None] + value_dim + rope_ids[None, :],
        mask=is_real[:, None] & (rope_ids < latent_dim - value_dim)[None, :],
        other=0.0,
    )
    return value, rope


@triton.jit
def _attend_chunk(query, kv, table, bounds, seen, scale, kv_strides, dims, SHAPE: tl.constexpr):
    """Attention of a block of columns to the tokens of a chunk.

    query: value part [COLUMNS, VALUE] and rotary part [COLUMNS, ROPE]; bounds: first token and the
    one after the last; seen [COLUMNS]: tokens that each column sees; SHAPE: page size, tokens of a
    tile, padded widths of values and rotary parts, stages
    -> maximum [COLUMNS], sum of exponentials [COLUMNS], weighted values [VALUE, COLUMNS].
    """
    q_value, q_rope = query
    first, last = bounds
    value_dim, latent_dim = dims
    PAGE: tl.constexpr = SHAPE[0]
    TILE: tl.constexpr = SHAPE[1]
    VALUE: tl.constexpr = SHAPE[2]
    COLUMNS: tl.constexpr = q_value.shape[0]
    tile_ids = tl.arange(0, TILE)
    peak = tl.full([COLUMNS], NOTHING, tl.float32)
    weight = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([VALUE, COLUMNS], tl.float32)
    # Page numbers are read one tile ahead, so that copies of latents need not wait for them.
    if PAGE % TILE == 0:
        pages = tl.load(table + first // PAGE)
    else:
        pages = tl.load(table + (first + tile_ids) // PAGE, mask=first + tile_ids < last, other=0)
    for begin in tl.range(first, last, TILE, num_stages=SHAPE[4]):
        tokens = begin + tile_ids
        inside = tokens < last
        lines = pages.to(tl.int64) * kv_strides[0] + (tokens % PAGE) * kv_strides[1]
        if PAGE % TILE == 0:
            pages = tl.load(table + tl.minimum(begin + TILE, last - 1) // PAGE)
        else:
            pages = tl.load(table + (tokens + TILE) // PAGE, mask=tokens + TILE < last, other=0)
        value, rope = _load_lines(kv, lines, inside, value_dim, latent_dim, VALUE, SHAPE[3])
        scores = tl.dot(q_rope, tl.trans(rope))
        scores = tl.dot(q_value, tl.trans(value), scores)
        visible = inside[None, :] & (tokens[None, :] < seen[:, None])
        scores = tl.where(visible, scores * scale, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - new_peak)
        p = tl.exp2(scores - new_peak[:, None])
        weight = weight * shrink + tl.sum(p, 1)
        acc = tl.dot(tl.trans(value), tl.trans(p.to(value.dtype)), acc * shrink[None, :])
        peak = new_peak
    return peak, weight, acc


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=MOVING)
def _attend_kernel(
    queries,
    kv,
    page_table,
    query_starts,
    lengths,
    out,
    partials,
    num_rows,
    least_chunks,
    most_chunks,
    scale,
    kv_strides,
    table_stride,
    num_heads,
    max_columns,
    value_dim,
    latent_dim,
    SHAPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dims = (value_dim, latent_dim)
    row_ids = tl.arange(0, ROWS)
    rows = row_work(
        row_ids, query_starts, lengths, num_rows, num_heads, least_chunks, most_chunks, COLUMNS
    )
    item_ends = tl.cumsum(rows[4], 0)
    column_ids = tl.arange(0, COLUMNS)
    value_ids = tl.arange(0, SHAPE[2])
    for item in range(tl.program_id(0), tl.sum(rows[4], 0), tl.num_programs(0)):
        row, start, count, length, num_chunks, block, first, last = find_item(
            item, row_ids, rows, item_ends, least_chunks, most_chunks
        )
        columns = block * COLUMNS + column_ids
        is_column = columns < count * num_heads
        line = start.to(tl.int64) * num_heads + columns  # index in queries and output
        q_value, q_rope = _load_lines(
            queries, line * latent_dim, is_column, value_dim, latent_dim, SHAPE[2], SHAPE[3]
        )
        seen = length - count + 1 + columns // num_heads  # tokens that a column's query sees
        table = page_table + row.to(tl.int64) * table_stride
        peak, weight, acc = _attend_chunk(
            (q_value, q_rope), kv, table, (first, last), seen, scale, kv_strides, dims, SHAPE
        )
        mask = is_column[None, :] & (value_ids < value_dim)[:, None]
        if num_chunks == 1:
            result = (acc / tl.maximum(weight, 1e-37)[None, :]).to(out.dtype.element_ty)
            tl.store(out + line[None, :] * value_dim + value_ids[:, None], result, mask=mask)
        else:
            line = (item * tl.minimum(max_columns, COLUMNS) + column_ids).to(tl.int64)
            tl.store(partials[0] + line[None, :] * value_dim + value_ids[:, None], acc, mask=mask)
            tl.store(partials[1] + line, peak, mask=is_column)
            tl.store(partials[2] + line, weight, mask=is_column)


def launch_mla_decode(
    queries: Tensor,
    kv: Tensor,
    rows: PagedRows,
    value_dim: int,
    scale: float,
    plan: SplitPlan,
    w_uv: Tensor | None = None,
    expanded: Tensor | None = None,
) -> Tensor:
    """Arguments as for `mla_decode`, bfloat16 or float16 (any float under the interpreter);
    `expanded` is its `out`."""
    num_tokens, num_heads, latent_dim = queries.shape
    out = queries.new_empty(num_tokens, num_heads, value_dim)
    if not num_tokens:
        return out if w_uv is None else expand_values(out, w_uv, expanded)
    num_rows = len(rows.lengths)
    max_columns = rows.max_query_len * num_heads
    partials = partial_results(plan, max_columns, num_rows, out)
    shape = (kv.shape[1], plan.tile, triton.next_power_of_2(value_dim))
    _attend_kernel[(plan.num_programs,)](
        queries,
        kv,
        rows.page_table,
        rows.query_starts,
        rows.lengths,
        out,
        tuple(partials),
        num_rows,
        plan.least_chunks,
        plan.most_chunks,
        scale * LOG2E,
        (kv.stride(0), kv.stride(1)),
        rows.page_table.stride(0),
        num_heads,
        max_columns,
        value_dim,
        latent_dim,
        SHAPE=(*shape, max(16, triton.next_power_of_2(latent_dim - value_dim)), plan.num_stages),
        COLUMNS=plan.columns,
        ROWS=rows_bound(num_rows),
        num_warps=plan.num_warps,
        **pdl(),
    )
    return launch_merge(partials, rows, out, plan, w_uv, expanded)
