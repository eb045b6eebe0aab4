"""Triton kernels of `prefill_attention.py` and `mla_prefill.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = 1.4426950408889634


@triton.jit
def _attend_keys(
    q, q_ids, keys, values, k_len, end, scale, dims, strides,
    CAUSAL: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Attention of queries q [M, DIM] over the first `end` keys and values of their row and head.

    `keys` and `values` point to the first ones; dims, strides: of keys and values
    -> maximum of the scores and sum of exponentials [M], to the base 2; weighted values [M, VALUE].
    """
    M: tl.constexpr = SHAPE[0]
    N: tl.constexpr = SHAPE[1]
    VALUE: tl.constexpr = SHAPE[3]
    n_ids = tl.arange(0, N)
    d_ids = tl.arange(0, SHAPE[2])
    v_ids = tl.arange(0, VALUE)
    peak = tl.full([M], -1.0e30, tl.float32)
    weight = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, VALUE], tl.float32)
    for begin in range(0, end, N):
        ids = begin + n_ids
        inside = ids < k_len
        k = tl.load(
            keys + ids[None, :].to(tl.int64) * strides[0] + d_ids[:, None],
            mask=inside[None, :] & (d_ids < dims[0])[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k) * scale
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (ids[None, :] <= q_ids[:, None])
        scores = tl.where(visible, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - new_peak)
        p = tl.exp2(scores - new_peak[:, None])
        weight = weight * shrink + tl.sum(p, 1)
        v = tl.load(
            values + ids[:, None].to(tl.int64) * strides[1] + v_ids[None, :],
            mask=inside[:, None] & (v_ids < dims[1])[None, :],
            other=0.0,
        )
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        peak = new_peak
    return peak, weight, acc


@triton.jit(do_not_specialize=("num_queries", "num_keys"))
def _attend_rows_kernel(
    queries,
    keys,
    values,
    starts,
    out,
    lse,
    num_queries,
    num_keys,
    dims,
    scale,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Some queries of one row and head over all keys that they see. PACKED: `starts` holds the
    bounds of the rows; else there is one row. SHAPE: queries and keys of a tile, padded widths of
    keys and values."""
    head = tl.program_id(1)
    q_start, q_len, k_len = 0, num_queries, num_keys
    if PACKED:
        q_start = tl.load(starts + tl.program_id(2)).to(tl.int32)
        q_len = tl.load(starts + tl.program_id(2) + 1).to(tl.int32) - q_start
        k_len = q_len
    k_start = tl.cast(q_start if CAUSAL else 0, tl.int64)
    first = tl.program_id(0) * SHAPE[0]
    if first < q_len:
        q_ids = first + tl.arange(0, SHAPE[0])
        d_ids = tl.arange(0, SHAPE[2])
        v_ids = tl.arange(0, SHAPE[3])
        is_query = q_ids < q_len
        rows = (q_start + q_ids).to(tl.int64)
        q = tl.load(
            queries + (rows * q_strides[0] + head * q_strides[1])[:, None] + d_ids[None, :],
            mask=is_query[:, None] & (d_ids < dims[0])[None, :],
            other=0.0,
        )
        k_line = keys + k_start * k_strides[0] + head * k_strides[1]
        v_line = values + k_start * v_strides[0] + head * v_strides[1]
        end = tl.minimum(first + SHAPE[0], k_len) if CAUSAL else k_len
        strides = (k_strides[0], v_strides[0])
        peak, weight, acc = _attend_keys(
            q, q_ids, k_line, v_line, k_len, end, scale, dims, strides, CAUSAL, SHAPE
        )
        line = rows * o_strides[0] + head * o_strides[1]
        target = out + line[:, None] + v_ids[None, :]
        mask = is_query[:, None] & (v_ids < dims[1])[None, :]
        tl.store(target, (acc / weight[:, None]).to(out.dtype.element_ty), mask=mask)
        log_sum = (peak + tl.log2(weight)) * 0.6931471805599453
        tl.store(lse + head * num_queries + q_start + q_ids, log_sum, mask=is_query)


def launch_attend_rows(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor | None,
    longest: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Arguments as for `attend_rows`; `longest`: most queries of a row; `causal`: within rows."""
    num_queries, heads, dim = queries.shape
    value_dim = values.shape[2]
    out = queries.new_empty(num_queries, heads, value_dim)
    lse = torch.empty(heads, num_queries, dtype=torch.float32, device=queries.device)
    packed = causal and starts is not None
    rows = len(starts) - 1 if starts is not None and packed else 1
    wide = dim > 128
    m = 128 if wide else 64
    shape = (m, 64, *(max(16, triton.next_power_of_2(width)) for width in (dim, value_dim)))
    _attend_rows_kernel[(-(-longest // m), heads, rows)](
        queries,
        keys,
        values,
        starts if starts is not None else lse,
        out,
        lse,
        num_queries,
        len(keys),
        (dim, value_dim),
        scale * _LOG2E,
        queries.stride()[:2],
        keys.stride()[:2],
        values.stride()[:2],
        out.stride()[:2],
        PACKED=packed,
        CAUSAL=causal,
        SHAPE=shape,
        num_warps=8 if wide else 4,
        num_stages=2,
    )
    return out, lse


@triton.jit(
    do_not_specialize=("lse_stride", "first_lse_stride", "second_lse_stride"),
    do_not_specialize_on_alignment=("first_lse", "second_lse"),
)
def _merge_kernel(
    out,
    lse,
    first,
    first_lse,
    second,
    second_lse,
    num_heads,
    dim,
    lse_stride,
    first_lse_stride,
    second_lse_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    token = tl.program_id(0)
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, DIM)
    is_head = heads < num_heads
    a = tl.load(first_lse + heads * first_lse_stride + token, mask=is_head, other=0.0)
    b = tl.load(second_lse + heads * second_lse_stride + token, mask=is_head, other=0.0)
    peak = tl.maximum(a, b)
    total = tl.exp(a - peak) + tl.exp(b - peak)
    offset = (token.to(tl.int64) * num_heads + heads)[:, None] * dim + dims[None, :]
    mask = is_head[:, None] & (dims < dim)[None, :]
    x = tl.load(first + offset, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(second + offset, mask=mask, other=0.0).to(tl.float32)
    merged = x * (tl.exp(a - peak) / total)[:, None] + y * (tl.exp(b - peak) / total)[:, None]
    tl.store(out + offset, merged.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + heads * lse_stride + token, peak + tl.log(total), mask=is_head)


def launch_merge(
    out: Tensor, first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor
) -> Tensor:
    """Merge the attention over two sets of keys into the attention over both.

    out, first, second [num_tokens, heads, dim], contiguous, any float types; out receives the
        merged output and may be first or second
    first_lse, second_lse [heads, num_tokens] float32, the last dimension contiguous
    -> log-sum-exp over both sets [heads, num_tokens] float32.
    """
    num_tokens, heads, dim = out.shape
    assert first_lse.stride(1) == second_lse.stride(1) == 1, "read along the tokens"
    lse = torch.empty(heads, num_tokens, dtype=torch.float32, device=out.device)
    _merge_kernel[(num_tokens,)](
        out,
        lse,
        first,
        first_lse,
        second,
        second_lse,
        heads,
        dim,
        lse.stride(0),
        first_lse.stride(0),
        second_lse.stride(0),
        HEADS=triton.next_power_of_2(heads),
        DIM=triton.next_power_of_2(dim),
        num_warps=8,
    )
    return lse
