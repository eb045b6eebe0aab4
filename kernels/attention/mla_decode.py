"""Absorbed MLA attention: queries meet the cached latents directly, all heads share one key.

For decode rows and for short extensions of a cached prefix, where reading each latent once costs
less than up-projecting it.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .attend import MAX_SCORES, attend, merge_
from .mla_absorb import expand_values


def mla_decode(
    queries: Tensor,
    kv: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    max_query_len: int,
    max_length: int,
    value_dim: int,
    scale: float,
    backend: str = "torch",
    w_uv: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of the newest tokens of each row over all the row's latents.

    queries [num_tokens, num_heads, latent_dim], rows one after the other
    kv [num_pages, page_size, latent_dim], the new tokens already written; queries' type
    page_table [num_rows, pages] int, pages >= ceil(max_length / page_size)
    query_starts [num_rows + 1] int; lengths [num_rows] int, new tokens included
    max_query_len, max_length: host bounds on both; value_dim: leading part of a latent that is
    its value (kv_lora_rank)
    backend: torch (the reference, any device and type) or triton (16-bit types on CUDA, never
    waits for the device; a row's result does not depend on the other rows, only on their number)
    -> [num_tokens, num_heads, value_dim] of queries' type, still in latent space; with w_uv
    [num_heads, v_dim, value_dim] up-projected by it, [num_tokens, num_heads, v_dim], in `out` if
    given, contiguous.
    """
    if backend == "triton":
        from .mla_decode_split import plan_splits

        num_rows, heads = len(lengths), queries.shape[1]
        plan = plan_splits(num_rows, max_query_len, heads, max_length, _num_sms(queries.device))
        rows = (page_table, query_starts, lengths, max_query_len)
        launch = _paged_kernel(queries, kv, value_dim)
        return launch(queries, kv, *rows, value_dim, scale, plan, w_uv, out)
    latent_out = _reference(
        queries, kv, page_table, query_starts, lengths, max_query_len, max_length, value_dim, scale
    )
    return latent_out if w_uv is None else expand_values(latent_out, w_uv, out)


def _reference(
    queries: Tensor,
    kv: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    max_query_len: int,
    max_length: int,
    value_dim: int,
    scale: float,
) -> Tensor:
    if max_query_len == 1:
        if not lengths.is_cuda and len(lengths):  # the bound may be as long as a request can get
            max_length = min(max_length, int(lengths.max()))
        return _one_query_per_row(queries, kv, page_table, lengths, max_length, value_dim, scale)
    output = queries.new_empty(*queries.shape[:2], value_dim)
    starts = query_starts.tolist()
    for row, length in enumerate(lengths.tolist()):
        span = slice(starts[row], starts[row + 1])
        output[span] = _one_row(queries[span], kv, page_table[row], length, value_dim, scale)
    return output


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


def _one_query_per_row(
    queries: Tensor,
    kv: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    max_length: int,
    value_dim: int,
    scale: float,
) -> Tensor:
    """Rows padded to the longest, as many at a time as fit the block size."""
    pages = page_table[:, : -(-max_length // kv.shape[1])]
    positions = torch.arange(pages.shape[1] * kv.shape[1], device=kv.device)
    step = max(1, MAX_SCORES // max(1, len(positions) * max(kv.shape[2], queries.shape[1])))
    parts = []
    for begin in range(0, len(queries), step):
        rows = slice(begin, begin + step)
        latents = kv[pages[rows]].flatten(1, 2).float()  # [rows, positions, latent_dim]
        visible = (positions < lengths[rows, None])[:, None]
        part, _ = attend(queries[rows].float(), latents, latents[..., :value_dim], visible, scale)
        parts.append(part)
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
    pages = pages[: -(-length // page_size)]  # the table may be as wide as a request can get
    step = max(1, MAX_SCORES // max(1, heads * count * page_size))  # pages per block
    last = torch.arange(length - count, length, device=kv.device)[:, None]  # each query's position
    for begin in range(0, -(-length // page_size), step):
        latents = kv[pages[begin : begin + step]].flatten(0, 1).float()
        first = begin * page_size
        latents = latents[: length - first]
        positions = torch.arange(first, first + len(latents), device=kv.device)
        visible = positions <= last
        merge_(output, lse, *attend(wide, latents, latents[:, :value_dim], visible, scale))
    return output.transpose(0, 1).to(queries.dtype)
