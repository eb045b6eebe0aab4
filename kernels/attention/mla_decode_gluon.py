"""Gluon kernel of `mla_decode.py` for Hopper: bfloat16, pages of whole tiles, power-of-two widths.

Both products run on warp groups (wgmma) from shared memory: scores = keys x queries and output =
values x weights, because tensor cores want their first side large. Shared memory holds two tiles
of 64 tokens: one is computed while the other is copied. How rows are cut into work items is in
`mla_decode_split.py`.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import pdl
from .backends import is_hopper
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

TILE = 64
_TILE = gl.constexpr(TILE)
_WARPS = 8
_WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [_WARPS, 1], [1, 0]))  # of values
_NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [_WARPS, 1], [1, 0]))  # of rotary parts
_LINE = gl.constexpr(gl.BlockedLayout([1], [32], [_WARPS], [0]))
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # old
_LATENTS = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _allocate(VALUE: gl.constexpr, ROPE: gl.constexpr, COLUMNS: gl.constexpr):
    """Allocate shared memory -> two tiles of value parts, two of rotary parts, a block's queries
    (value part and rotary part), the softmax weights of a tile."""
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_TILE, COLUMNS], gl.bfloat16)
    value = gl.allocate_shared_memory(gl.bfloat16, [2, _TILE, VALUE], _LATENTS)
    rope = gl.allocate_shared_memory(gl.bfloat16, [2, _TILE, ROPE], _LATENTS)
    q_value = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, VALUE], _LATENTS)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, ROPE], _LATENTS)
    weights = gl.allocate_shared_memory(gl.bfloat16, [_TILE, COLUMNS], WEIGHTS)
    return value, rope, q_value, q_rope, weights


@gluon.jit
def _load_queries(queries, smem_value, smem_rope, line, num_columns, first_column):
    """Copy a block of columns, the first at index `line` of queries, to shared memory. Columns
    after the last one of the row are 0."""
    VALUE: gl.constexpr = smem_value.shape[1]
    ROPE: gl.constexpr = smem_rope.shape[1]
    at = gl.arange(0, smem_value.shape[0], gl.SliceLayout(1, _WIDE))
    ids = gl.arange(0, VALUE, gl.SliceLayout(0, _WIDE))
    lines = queries + (line + at) * (VALUE + ROPE)
    mask = (first_column + at < num_columns)[:, None] & (ids < VALUE)[None, :]
    smem_value.store(gl.load(lines[:, None] + ids[None, :], mask=mask, other=0.0))
    at = gl.arange(0, smem_value.shape[0], gl.SliceLayout(1, _NARROW))
    ids = gl.arange(0, ROPE, gl.SliceLayout(0, _NARROW))
    lines = queries + (line + at) * (VALUE + ROPE) + VALUE
    mask = (first_column + at < num_columns)[:, None] & (ids < ROPE)[None, :]
    smem_rope.store(gl.load(lines[:, None] + ids[None, :], mask=mask, other=0.0))


@gluon.jit
def _copy_tile(smem_value, smem_rope, base, token_stride, num_tokens):
    """Start to copy the tile of latents at `base`; tokens after its num_tokens are 0."""
    VALUE: gl.constexpr = smem_value.shape[1]
    ROPE: gl.constexpr = smem_rope.shape[1]
    at = gl.arange(0, _TILE, gl.SliceLayout(1, _WIDE))
    ids = gl.arange(0, VALUE, gl.SliceLayout(0, _WIDE))
    mask = (at < num_tokens)[:, None] & (ids < VALUE)[None, :]
    source = base + (at * token_stride)[:, None] + ids[None, :]
    _copy(smem_value, source, mask=mask)
    at = gl.arange(0, _TILE, gl.SliceLayout(1, _NARROW))
    ids = gl.arange(0, ROPE, gl.SliceLayout(0, _NARROW))
    mask = (at < num_tokens)[:, None] & (ids < ROPE)[None, :]
    source = base + VALUE + (at * token_stride)[:, None] + ids[None, :]
    _copy(smem_rope, source, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _attend_tile(state, key_value, key_rope, q_value, q_rope, smem_p, visible, scale):
    """Add the tokens of a tile to `state` and return it: maximum of each column [columns], sums of
    exponentials [TILE, columns], weighted values [values, columns]."""
    peak, weight, acc = state
    SCORES: gl.constexpr = weight.type.layout
    OUTPUT: gl.constexpr = acc.type.layout
    s = gl.zeros([_TILE, acc.shape[1]], gl.float32, SCORES)
    s = warpgroup_mma(key_rope, q_rope, s, use_acc=False)
    s = warpgroup_mma(key_value, q_value, s)
    s = gl.where(visible, s * scale, -float("inf"))
    new_peak = gl.maximum(peak, gl.max(s, 0))
    shrink = gl.exp2(peak - new_peak)
    p = gl.exp2(s - new_peak[None, :])
    weight = weight * shrink[None, :] + p
    smem_p.store(p.to(smem_p.dtype))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(0, OUTPUT))[None, :]
    fence_async_shared()
    acc = warpgroup_mma(key_value.permute((1, 0)), smem_p, acc)
    return new_peak, weight, acc


@gluon.jit
def _attend_chunk(
    state, smem, kv, table, first, last, seen, scale, page_stride, token_stride, PAGE: gl.constexpr
):
    """Add the tokens of a chunk to `state` and return it. The copy of the first tile has begun."""
    smem_value, smem_rope, q_value, q_rope, smem_p = smem
    _, weight, _ = state
    SCORES: gl.constexpr = weight.type.layout
    page = gl.load(table + gl.minimum(first + _TILE, last - 1) // PAGE)
    slot = 0
    for begin in range(first, last, _TILE):
        # Page numbers are read one tile ahead, so that copies of latents need not wait for them.
        ahead = begin + _TILE
        base = kv + page.to(gl.int64) * page_stride + ahead % PAGE * token_stride
        _copy_tile(
            smem_value.index(1 - slot), smem_rope.index(1 - slot), base, token_stride, last - ahead
        )
        page = gl.load(table + gl.minimum(ahead + _TILE, last - 1) // PAGE)
        async_copy.wait_group(1)
        fence_async_shared()
        tokens = begin + gl.arange(0, _TILE, gl.SliceLayout(1, SCORES))
        visible = (tokens < last)[:, None] & (tokens[:, None] < seen[None, :])
        state = _attend_tile(
            state,
            smem_value.index(slot),
            smem_rope.index(slot),
            q_value.permute((1, 0)),
            q_rope.permute((1, 0)),
            smem_p,
            visible,
            scale,
        )
        slot = 1 - slot
    async_copy.wait_group(0)
    return state


@gluon.jit
def _store(state, out, partials, line, item_line, num_chunks, num_columns, first_column):
    """Store the results of a block of columns: at index `line` of out if the row is not cut, else
    at index `item_line` of the partial results."""
    peak, weight, acc = state
    VALUE: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    OUTPUT: gl.constexpr = acc.type.layout
    SCORES: gl.constexpr = weight.type.layout
    total = gl.sum(weight, 0)
    at = gl.arange(0, COLUMNS, gl.SliceLayout(0, OUTPUT))
    ids = gl.arange(0, VALUE, gl.SliceLayout(1, OUTPUT))
    mask = (first_column + at < num_columns)[None, :] & (ids < VALUE)[:, None]
    if num_chunks == 1:
        divisor = gl.convert_layout(gl.maximum(total, 1e-37), gl.SliceLayout(0, OUTPUT))
        result = (acc / divisor[None, :]).to(out.dtype.element_ty)
        gl.store(out + ((line + at) * VALUE)[None, :] + ids[:, None], result, mask=mask)
    else:
        lines = ((item_line + at) * VALUE)[None, :]
        gl.store(partials[0] + lines + ids[:, None], acc, mask=mask)
        column_ids = gl.arange(0, COLUMNS, gl.SliceLayout(0, SCORES))
        is_column = first_column + column_ids < num_columns
        gl.store(partials[1] + item_line + column_ids, peak, mask=is_column)
        gl.store(partials[2] + item_line + column_ids, total, mask=is_column)


@gluon.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=MOVING)
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
    SHAPE: gl.constexpr,
    COLUMNS: gl.constexpr,
    ROWS: gl.constexpr,
    PDL: gl.constexpr,
):
    PAGE: gl.constexpr = SHAPE[0]
    VALUE: gl.constexpr = SHAPE[1]
    ROPE: gl.constexpr = SHAPE[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, COLUMNS // 2, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, COLUMNS, 16])
    smem = _allocate(VALUE, ROPE, COLUMNS)
    smem_value, smem_rope, q_value, q_rope, _ = smem
    row_ids = gl.arange(0, ROWS, _LINE)
    rows = row_work(
        row_ids, query_starts, lengths, num_rows, num_heads, least_chunks, most_chunks, COLUMNS
    )
    ends = gl.associative_scan(rows[4], 0, _add)
    if PDL:  # nothing read so far is written by the kernel before
        gdc_wait()
        gdc_launch_dependents()
    for item in range(gl.program_id(0), gl.sum(rows[4], 0), gl.num_programs(0)):
        row, start, count, length, num_chunks, block, first, last = find_item(
            item, row_ids, rows, ends, least_chunks, most_chunks
        )
        table = page_table + row.to(gl.int64) * table_stride
        page = gl.load(table + first // PAGE).to(gl.int64)
        base = kv + page * kv_strides[0] + first % PAGE * kv_strides[1]
        _copy_tile(smem_value.index(0), smem_rope.index(0), base, kv_strides[1], last - first)
        column = block * COLUMNS
        line = start.to(gl.int64) * num_heads + column
        _load_queries(queries, q_value, q_rope, line, count * num_heads, column)
        at = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, SCORES))
        seen = length - count + 1 + at // num_heads  # tokens that a column's query sees
        peak = gl.full([COLUMNS], NOTHING, gl.float32, gl.SliceLayout(0, SCORES))
        weight = gl.zeros([_TILE, COLUMNS], gl.float32, SCORES)
        state = (peak, weight, gl.zeros([VALUE, COLUMNS], gl.float32, OUTPUT))
        state = _attend_chunk(
            state, smem, kv, table, first, last, seen, scale, kv_strides[0], kv_strides[1], PAGE
        )
        item_line = gl.minimum(max_columns, COLUMNS).to(gl.int64) * item
        _store(state, out, partials, line, item_line, num_chunks, count * num_heads, column)


def fits(queries: Tensor, kv: Tensor, value_dim: int) -> bool:
    """Whether the kernel can run: on Hopper, for the type and the widths that it was measured with,
    and with latents aligned for copies of 16 bytes."""
    return (
        queries.dtype == torch.bfloat16
        and (value_dim, queries.shape[2] - value_dim) == (512, 64)
        and kv.shape[1] % TILE == 0
        and kv.data_ptr() % 16 == kv.stride(0) % 8 == kv.stride(1) % 8 == 0
        and is_hopper(queries.device)
    )


def launch_mla_decode_gluon(
    queries: Tensor,
    kv: Tensor,
    rows: PagedRows,
    value_dim: int,
    scale: float,
    plan: SplitPlan,
    w_uv: Tensor | None = None,
    expanded: Tensor | None = None,
) -> Tensor:
    """Arguments as for `mla_decode`, if they are as `fits` says; `expanded` is its `out`."""
    num_tokens, num_heads, latent_dim = queries.shape
    out = queries.new_empty(num_tokens, num_heads, value_dim)
    if not num_tokens:
        return out if w_uv is None else expand_values(out, w_uv, expanded)
    num_rows = len(rows.lengths)
    max_columns = rows.max_query_len * num_heads
    partials = partial_results(plan, max_columns, num_rows, out)
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
        SHAPE=(kv.shape[1], value_dim, latent_dim - value_dim),
        COLUMNS=plan.columns,
        ROWS=rows_bound(num_rows),
        num_warps=_WARPS,
        **pdl(),
    )
    return launch_merge(partials, rows, out, plan, w_uv, expanded)
