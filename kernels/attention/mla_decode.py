"""Absorbed MLA attention: queries meet the cached latents directly, and all heads share one key.

For decode rows and for short extensions of a cached prefix, where reading each latent once costs
less than up-projecting it.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .attend import MAX_SCORES, attend, merge_
from .mla_projections import expand_values
from .paged_rows import PagedRows


def mla_decode(
    queries: Tensor,
    kv: Tensor,
    rows: PagedRows,
    value_dim: int,
    scale: float,
    backend: str = "torch",
    w_uv: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of the new tokens of each row over all latents of the row.

    queries [num_tokens, num_heads, latent_dim], contiguous, from `absorb_queries`
    kv [num_pages, page_size, latent_dim], of the type of queries: one layer, pages may be strided;
        it already holds the latents of the new tokens
    value_dim: the leading part of a latent that is its value (kv_lora_rank)
    scale: factor of the scores before the softmax
    backend: "torch" (the reference, any device and type) or "triton" (16-bit types on CUDA; never
        waits for the device; a row's result depends on the number of the other rows, not on them)
    w_uv [num_heads, v_dim, value_dim]: if given, `expand_values` is applied to the result
    out [num_tokens, num_heads, v_dim], contiguous: receives the result; only with w_uv
    -> [num_tokens, num_heads, value_dim] in latent space or, with w_uv, [num_tokens, num_heads,
    v_dim]; of the type of queries, float32 inside.
    """
    if backend == "triton":
        from .mla_decode_split import plan_splits

        num_sms = _num_sms(queries.device)
        plan = plan_splits(
            len(rows.lengths), rows.max_query_len, queries.shape[1], rows.max_length, num_sms
        )
        launch = _paged_kernel(queries, kv, value_dim)
        return launch(queries, kv, rows, value_dim, scale, plan, w_uv, out)
    latent_out = _reference(queries, kv, rows, value_dim, scale)
    return latent_out if w_uv is None else expand_values(latent_out, w_uv, out)


def _paged_kernel(queries: Tensor, kv: Tensor, value_dim: int) -> Callable[..., Tensor]:
    """The launcher of the fastest kernel that can run."""
    from . import mla_decode_gluon, mla_decode_triton

    if mla_decode_gluon.fits(queries, kv, value_dim):
        return mla_decode_gluon.launch_mla_decode_gluon
    return mla_decode_triton.launch_mla_decode


@cache
def _num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _reference(
    queries: Tensor, kv: Tensor, rows: PagedRows, value_dim: int, scale: float
) -> Tensor:
    if rows.max_query_len == 1:
        return _one_query_per_row(queries, kv, rows, value_dim, scale)
    output = queries.new_empty(*queries.shape[:2], value_dim)
    starts = rows.query_starts.tolist()
    for row, length in enumerate(rows.lengths.tolist()):
        span = slice(starts[row], starts[row + 1])
        pages = rows.page_table[row]
        output[span] = _one_row(queries[span], kv, pages, length, value_dim, scale)
    return output


def _one_query_per_row(
    queries: Tensor, kv: Tensor, rows: PagedRows, value_dim: int, scale: float
) -> Tensor:
    """Rows padded to the longest, as many at a time as fit the block size."""
    max_length = rows.max_length
    if not rows.lengths.is_cuda and len(rows.lengths):  # the bound may be far too large
        max_length = min(max_length, int(rows.lengths.max()))
    pages = rows.page_table[:, : -(-max_length // kv.shape[1])]
    positions = torch.arange(pages.shape[1] * kv.shape[1], device=kv.device)
    step = max(1, MAX_SCORES // max(1, len(positions) * max(kv.shape[2], queries.shape[1])))
    parts = []
    for begin in range(0, len(queries), step):
        part = slice(begin, begin + step)
        latents = kv[pages[part]].flatten(1, 2).float()  # [rows, positions, latent_dim]
        visible = (positions < rows.lengths[part, None])[:, None]
        wide = queries[part].float()
        output, _ = attend(wide, latents, latents[..., :value_dim], visible, scale)
        parts.append(output)
    if not parts:
        return queries.new_empty(*queries.shape[:2], value_dim)
    return torch.cat(parts).to(queries.dtype)


def _one_row(
    queries: Tensor, kv: Tensor, pages: Tensor, length: int, value_dim: int, scale: float
) -> Tensor:
    """Several queries of one row, over blocks of its pages."""
    count, heads, _ = queries.shape
    wide = queries.float().transpose(0, 1).contiguous()  # [heads, count, latent_dim]
    output = wide.new_zeros(heads, count, value_dim)
    lse = wide.new_full((heads, count), -torch.inf)
    page_size = kv.shape[1]
    pages = pages[: -(-length // page_size)]  # the table may have columns for a longer row
    step = max(1, MAX_SCORES // max(1, heads * count * page_size))  # pages per block
    query_positions = torch.arange(length - count, length, device=kv.device)[:, None]
    for begin in range(0, len(pages), step):
        first = begin * page_size
        latents = kv[pages[begin : begin + step]].flatten(0, 1)[: length - first].float()
        positions = torch.arange(first, first + len(latents), device=kv.device)
        visible = positions <= query_positions
        merge_(output, lse, *attend(wide, latents, latents[:, :value_dim], visible, scale))
    return output.transpose(0, 1).to(queries.dtype)
