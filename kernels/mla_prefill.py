"""Up-projected MLA attention: keys and values of every head are rebuilt from the latents.

For long runs of new tokens, where the cheaper scores pay for the up-projection. A cached prefix
is read in bounded segments, so memory does not grow with the context.
"""

import torch
from torch import Tensor

from .attend import MAX_SCORES, attend, merge_

_SEGMENT = 4096  # cached tokens up-projected at a time


def mla_prefill(
    queries: Tensor,
    latents: Tensor,
    kv: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    kv_b: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of the newest tokens of each row over its cached prefix and themselves.

    queries [num_tokens, num_heads, qk_head_dim], no-position part first, rows after one another
    latents [num_tokens, latent_dim] of the same tokens
    kv [num_pages, page_size, latent_dim]: where the prefix is read; queries' type
    page_table [num_rows, pages] int; query_starts [num_rows + 1] int64
    lengths [num_rows] int64, new tokens included
    kv_b [num_heads, nope_dim + v_dim, kv_lora_rank]: up-projection of both, key part first
    -> [num_tokens, num_heads, v_dim] of queries' type.
    """
    rank = kv_b.shape[2]
    nope = queries.shape[2] - (latents.shape[1] - rank)
    output = queries.new_empty(*queries.shape[:2], kv_b.shape[1] - nope)
    starts = query_starts.tolist()
    for row, length in enumerate(lengths.tolist()):
        span = slice(starts[row], starts[row + 1])
        prefix = length - (span.stop - span.start)
        output[span] = _one_row(
            queries[span], latents[span], kv, page_table[row], prefix, kv_b, scale
        )
    return output


def _one_row(
    queries: Tensor,
    latents: Tensor,
    kv: Tensor,
    pages: Tensor,
    prefix: int,
    kv_b: Tensor,
    scale: float,
) -> Tensor:
    count, heads, dim = queries.shape
    nope = dim - (latents.shape[1] - kv_b.shape[2])
    wide = queries.float().transpose(0, 1).contiguous()  # [heads, count, qk_head_dim]
    output = wide.new_zeros(heads, count, kv_b.shape[1] - nope)
    lse = wide.new_full((heads, count), -torch.inf)
    page_size = kv.shape[1]
    step = max(1, _SEGMENT // page_size)
    for begin in range(0, -(-prefix // page_size), step):
        cached = kv[pages[begin : begin + step]].flatten(0, 1)[: prefix - begin * page_size]
        keys, values = _up_project(cached, kv_b, nope)
        _attend_blocks(output, lse, wide, keys, values, None, scale)
    for begin in range(0, count, _SEGMENT):
        keys, values = _up_project(latents[begin : begin + _SEGMENT], kv_b, nope)
        _attend_blocks(output, lse, wide, keys, values, begin, scale)
    return output.transpose(0, 1).to(queries.dtype)


def _up_project(latents: Tensor, kv_b: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """-> keys [heads, tokens, qk_head_dim], values [heads, tokens, v_dim], float32. The product
    is rounded to the model's type, as a stored key would be."""
    rank = kv_b.shape[2]
    both = (latents[:, :rank] @ kv_b.transpose(1, 2)).float()  # [heads, tokens, nope + v]
    rotary = latents[:, rank:].float().expand(kv_b.shape[0], -1, -1)
    return torch.cat((both[..., :nope], rotary), -1), both[..., nope:]


def _attend_blocks(
    output: Tensor,
    lse: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    first_key: int | None,
    scale: float,
) -> None:
    """Fold a segment of keys into (output, lse), a bounded block of queries at a time.
    `first_key` is the segment's place among the new tokens, None for the prefix (all visible)."""
    heads, count, _ = queries.shape
    num_keys = keys.shape[1]
    step = max(1, MAX_SCORES // max(1, heads * num_keys))
    for begin in range(0 if first_key is None else first_key, count, step):
        rows = slice(begin, min(begin + step, count))
        visible = None
        if first_key is not None:
            positions = torch.arange(first_key, first_key + num_keys, device=keys.device)
            visible = positions <= torch.arange(begin, rows.stop, device=keys.device)[:, None]
        block = attend(queries[:, rows], keys, values, visible, scale)
        merge_(output[:, rows], lse[:, rows], *block)
