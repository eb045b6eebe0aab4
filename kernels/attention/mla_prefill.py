"""Up-projected MLA attention: keys and values of every head are rebuilt from the latents.

For long runs of new tokens, where the cheaper scores pay for the up-projection. A cached prefix
is read in bounded segments, so memory does not grow with the context.
"""

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .attend import MAX_SCORES, attend, merge_
from .prefill_attention import attend_rows
from .up_project import up_project

_SEGMENT = 4096  # cached tokens up-projected at a time by the reference
_FAST_SEGMENT = 16384  # and by the other backends: 20 KB a token, so 340 MB


def mla_prefill(
    queries: Tensor,
    latents: Tensor,
    kv: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    query_lens: tuple[int, ...],
    prefix_lens: tuple[int, ...],
    kv_b: Tensor,
    scale: float,
    backend: str = "torch",
    own: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of the newest tokens of each row over its cached prefix and themselves.

    queries [num_tokens, num_heads, qk_head_dim], no-position part first, rows after one another
    latents [num_tokens, latent_dim] of the same tokens
    kv [num_pages, page_size, latent_dim]: where the prefix is read; queries' type
    page_table [num_rows, pages] int; query_starts [num_rows + 1] int on the device
    query_lens, prefix_lens: tokens of each row, new and cached, known on the host
    kv_b [num_heads, nope_dim + v_dim, kv_lora_rank]: up-projection of both, key part first
    backend: torch (the reference, any device and type), or fa3, flashinfer, triton on CUDA
    own: what `up_project` makes of `latents`, if somebody has done it; not for the reference
    -> [num_tokens, num_heads, v_dim] of queries' type, in `out` if given and the backend can.
    """
    if backend != "torch":
        return _fast(
            queries,
            latents,
            kv,
            page_table,
            query_starts,
            query_lens,
            prefix_lens,
            kv_b,
            scale,
            backend,
            own,
            out,
        )
    nope = queries.shape[2] - (latents.shape[1] - kv_b.shape[2])
    output = queries.new_empty(*queries.shape[:2], kv_b.shape[1] - nope)
    for row, (begin, end) in enumerate(pairwise(accumulate(query_lens, initial=0))):
        span, prefix = slice(begin, end), prefix_lens[row]
        output[span] = _one_row(
            queries[span], latents[span], kv, page_table[row], prefix, kv_b, scale
        )
    return output


def _fast(
    queries: Tensor,
    latents: Tensor,
    kv: Tensor,
    page_table: Tensor,
    query_starts: Tensor | None,
    query_lens: tuple[int, ...],
    prefix_lens: tuple[int, ...],
    kv_b: Tensor,
    scale: float,
    backend: str,
    own: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """All rows among their own new tokens in one call, then each cached prefix in segments."""
    spans = [slice(*pair) for pair in pairwise(accumulate(query_lens, initial=0))]
    if max(query_lens, default=0) > _FAST_SEGMENT:  # the new tokens are in their pages already
        parts = []
        for row, (span, prefix) in enumerate(zip(spans, prefix_lens, strict=True)):
            for begin in range(span.start, span.stop, _FAST_SEGMENT):
                part = slice(begin, min(begin + _FAST_SEGMENT, span.stop))
                cached = prefix + begin - span.start
                parts.append(
                    _fast(
                        queries[part],
                        latents[part],
                        kv,
                        page_table[row : row + 1],
                        None,
                        (part.stop - begin,),
                        (cached,),
                        kv_b,
                        scale,
                        backend,
                    )
                )
        return torch.cat(parts)
    nope = queries.shape[2] - (latents.shape[1] - kv_b.shape[2])
    if not query_lens:
        return queries.new_empty(*queries.shape[:2], kv_b.shape[1] - nope)
    if own is None:
        own = up_project(latents, kv_b, nope)
    output, lse = attend_rows(queries, *own, query_starts, query_lens, True, scale, backend, out)
    del own  # before there are those of a prefix
    for row, (span, prefix) in enumerate(zip(spans, prefix_lens, strict=True)):
        if prefix:
            _fold_prefix(
                output[span],
                lse[:, span],
                queries[span],
                kv,
                page_table[row],
                prefix,
                kv_b,
                scale,
                backend,
            )
    return output


def _fold_prefix(
    output: Tensor,
    lse: Tensor,
    queries: Tensor,
    kv: Tensor,
    pages: Tensor,
    prefix: int,
    kv_b: Tensor,
    scale: float,
    backend: str,
) -> None:
    """Merge a row's attention over its cached prefix into its output, in place. Between segments
    the running output is float32, rounded once at the end."""
    from .prefill_attention_triton import launch_merge

    page_size = kv.shape[1]
    step = max(1, _FAST_SEGMENT // page_size)
    running = output
    for begin in range(0, -(-prefix // page_size), step):
        tokens = slice(0, prefix - begin * page_size)
        cached = kv[pages[begin : begin + step]].flatten(0, 1)[tokens]
        if (begin + step) * page_size >= prefix:
            target = output
        elif running is output:
            target = torch.empty_like(output, dtype=torch.float32)
        else:
            target = running
        # No name keeps what a segment needed while the next one makes its own.
        lse = launch_merge(
            target, running, lse, *_attend_all(queries, cached, kv_b, scale, backend)
        )
        running = target


def _attend_all(
    queries: Tensor, cached: Tensor, kv_b: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of all queries to all of `cached` [tokens, latent_dim] -> as `attend_rows`."""
    nope = queries.shape[2] - (cached.shape[1] - kv_b.shape[2])
    keys, values = up_project(cached, kv_b, nope)
    return attend_rows(queries, keys, values, None, (len(queries),), False, scale, backend)


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
