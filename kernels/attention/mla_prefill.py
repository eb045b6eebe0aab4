"""Up-projected MLA attention: keys and values of every head are computed from the latents.

For long runs of new tokens, where the cheaper scores pay for the up-projection. A cached prefix is
read in segments of bounded size, so memory does not grow with the context. Example: a row of 5 new
tokens after 10 cached ones, pages of 4 tokens, segments of 8 tokens (2 pages).

    positions    0 ... 7    8 9         10 ... 14
    keys from    kv         kv          the new tokens themselves
    part         segment 1  segment 2   causal attention of the new tokens, computed first
    mask         none       none        causal

Each part gives an output and the log-sum-exp of its scores, with which the parts are merged exactly
(`merge_` in `attend.py`, on CUDA `launch_merge`).
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .attend import MAX_SCORES, attend, merge_
from .mla_projections import up_project
from .paged_rows import PagedRows
from .prefill_attention import attend_rows

_SEGMENT = 4096  # tokens up-projected at a time by the reference
_FAST_SEGMENT = 16384  # and by the other backends: 20 KB a token, so 340 MB

KeysValues = tuple[Tensor, Tensor]  # [num_tokens, heads, qk_head_dim], [num_tokens, heads, v_dim]


def mla_prefill(
    queries: Tensor,
    new_tokens: Tensor | KeysValues,
    kv: Tensor,
    rows: PagedRows,
    kv_b: Tensor,
    scale: float,
    backend: str = "torch",
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of the new tokens of each row over its cached prefix and themselves.

    queries [num_tokens, heads, nope + rope], rotated
    new_tokens: latents [num_tokens, latent_dim] of the new tokens; or, for backends other than
        "torch" and rows of up to 16,384 new tokens, what `up_project` made of these latents
    kv [num_pages, page_size, latent_dim]: one layer, pages may be strided; holds the prefixes and,
        for longer rows, also the latents of the new tokens
    rows: with `query_lens` and `prefix_lens`
    kv_b [heads, nope + v_dim, kv_lora_rank]: up-projection of keys, then of values
    scale: factor of the scores before the softmax
    backend: "torch" (the reference, any device and type), or "fa3", "flashinfer" or "triton" (on
        CUDA, 16-bit types)
    out [num_tokens, heads, v_dim], contiguous: receives the result if the backend can write there
        (FA3, in rows of up to 16,384 new tokens)
    All tensors but those of `rows` are of one type -> [num_tokens, heads, v_dim] of this type,
    float32 inside.
    """
    if not rows.query_lens:
        return queries.new_empty(*queries.shape[:2], _value_dim(queries, kv, kv_b))
    if backend != "torch" and max(rows.query_lens) <= _FAST_SEGMENT:
        return _packed_rows(queries, new_tokens, kv, rows, kv_b, scale, backend, out)
    assert isinstance(new_tokens, Tensor), "the reference and long rows read latents"
    outputs: list[Tensor] = []
    for row, bounds in enumerate(pairwise(accumulate(rows.query_lens, initial=0))):
        span, pages, prefix = slice(*bounds), rows.page_table[row], rows.prefix_lens[row]
        if backend == "torch":
            segments = _prefix_segments(kv, pages, prefix, _SEGMENT)
            outputs.append(_reference_row(queries[span], new_tokens[span], segments, kv_b, scale))
        else:
            outputs += _long_row(
                queries[span], new_tokens[span], kv, pages, prefix, kv_b, scale, backend
            )
    return torch.cat(outputs)


def _nope_dim(queries: Tensor, latents: Tensor, kv_b: Tensor) -> int:
    """Width of a query without its rotary part; latents [..., latent_dim]."""
    return queries.shape[2] - (latents.shape[-1] - kv_b.shape[2])


def _value_dim(queries: Tensor, latents: Tensor, kv_b: Tensor) -> int:
    return kv_b.shape[1] - _nope_dim(queries, latents, kv_b)


def _prefix_segments(kv: Tensor, pages: Tensor, prefix: int, num_tokens: int) -> Iterator[Tensor]:
    """The first `prefix` cached latents of the row with these pages, about `num_tokens` at a time:
    [at most num_tokens, rounded to pages, latent_dim]."""
    page_size = kv.shape[1]
    step = max(1, num_tokens // page_size)  # pages
    for begin in range(0, -(-prefix // page_size), step):
        yield kv[pages[begin : begin + step]].flatten(0, 1)[: prefix - begin * page_size]


def _packed_rows(
    queries: Tensor,
    new_tokens: Tensor | KeysValues,
    kv: Tensor,
    rows: PagedRows,
    kv_b: Tensor,
    scale: float,
    backend: str,
    out: Tensor | None,
) -> Tensor:
    """All rows among their own new tokens in one call, then each cached prefix in segments."""
    if isinstance(new_tokens, Tensor):
        new_tokens = up_project(new_tokens, kv_b, _nope_dim(queries, kv, kv_b))
    keys, values = new_tokens
    lens = rows.query_lens
    output, lse = attend_rows(queries, keys, values, rows.query_starts, lens, scale, backend, out)
    del new_tokens, keys, values  # frees them before those of a prefix are computed
    begin = 0
    for row, (count, prefix) in enumerate(zip(lens, rows.prefix_lens, strict=True)):
        span = slice(begin, begin + count)
        begin += count
        if prefix:
            segments = _prefix_segments(kv, rows.page_table[row], prefix, _FAST_SEGMENT)
            running = (output[span], lse[:, span])
            _fold_prefix(running, queries[span], segments, prefix, kv_b, scale, backend)
    return output


def _long_row(
    queries: Tensor,
    latents: Tensor,
    kv: Tensor,
    pages: Tensor,
    prefix: int,
    kv_b: Tensor,
    scale: float,
    backend: str,
) -> list[Tensor]:
    """A row in segments of its new tokens -> the output of each. The latents of earlier segments
    are in their pages already, so that they are part of the prefix of the later ones."""
    outputs = []
    for begin in range(0, len(queries), _FAST_SEGMENT):
        part = slice(begin, begin + _FAST_SEGMENT)
        keys, values = up_project(latents[part], kv_b, _nope_dim(queries, latents, kv_b))
        lens = (len(keys),)
        running = attend_rows(queries[part], keys, values, None, lens, scale, backend)
        del keys, values  # frees them before those of a prefix are computed
        segments = _prefix_segments(kv, pages, prefix + begin, _FAST_SEGMENT)
        _fold_prefix(running, queries[part], segments, prefix + begin, kv_b, scale, backend)
        outputs.append(running[0])
    return outputs


def _fold_prefix(
    running: tuple[Tensor, Tensor],
    queries: Tensor,
    segments: Iterator[Tensor],
    prefix: int,
    kv_b: Tensor,
    scale: float,
    backend: str,
) -> None:
    """Merge the attention of a row over its cached prefix into `running` (output, log-sum-exp).

    Only the output is changed in place. Between segments it is float32, rounded once at the end.
    """
    from .prefill_attention_triton import launch_merge

    output, lse = running
    merged = output
    num_merged = 0  # tokens of the prefix
    for cached in segments:
        num_merged += len(cached)
        if num_merged == prefix:
            target = output
        elif merged is output:
            target = torch.empty_like(output, dtype=torch.float32)
        else:
            target = merged
        # No name keeps the keys, values and output of a segment while the next one makes its own.
        lse = launch_merge(
            target, merged, lse, *_attend_segment(queries, cached, kv_b, scale, backend)
        )
        merged = target


def _attend_segment(
    queries: Tensor, cached: Tensor, kv_b: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of all queries to all of `cached` [num_keys, latent_dim] -> as `attend_rows`."""
    keys, values = up_project(cached, kv_b, _nope_dim(queries, cached, kv_b))
    return attend_rows(queries, keys, values, None, None, scale, backend)


def _reference_row(
    queries: Tensor, latents: Tensor, segments: Iterator[Tensor], kv_b: Tensor, scale: float
) -> Tensor:
    """`segments`: the cached prefix."""
    count, heads, _ = queries.shape
    nope = _nope_dim(queries, latents, kv_b)
    wide = queries.float().transpose(0, 1).contiguous()  # [heads, count, qk_head_dim]
    output = wide.new_zeros(heads, count, kv_b.shape[1] - nope)
    lse = wide.new_full((heads, count), -torch.inf)
    for cached in segments:
        keys, values = _up_project(cached, kv_b, nope)
        _attend_blocks(output, lse, wide, keys, values, None, scale)
    for begin in range(0, count, _SEGMENT):
        keys, values = _up_project(latents[begin : begin + _SEGMENT], kv_b, nope)
        _attend_blocks(output, lse, wide, keys, values, begin, scale)
    return output.transpose(0, 1).to(queries.dtype)


def _up_project(latents: Tensor, kv_b: Tensor, nope: int) -> KeysValues:
    """-> keys [heads, tokens, qk_head_dim], values [heads, tokens, v_dim], float32. The product
    is rounded to the model's type, as a stored key would be."""
    rank = kv_b.shape[2]
    both = (latents[:, :rank] @ kv_b.transpose(1, 2)).float()  # [heads, tokens, nope + v_dim]
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
    """Fold a segment of keys into (output, lse) in place, a bounded block of queries at a time.

    first_key: index of the segment's first key among the new tokens, for the causal mask; None
    for a segment of the prefix, which all queries see.
    """
    heads, count, _ = queries.shape
    num_keys = keys.shape[1]
    step = max(1, MAX_SCORES // max(1, heads * num_keys))
    for begin in range(first_key or 0, count, step):
        block = slice(begin, min(begin + step, count))
        visible = None
        if first_key is not None:
            key_ids = torch.arange(first_key, first_key + num_keys, device=keys.device)
            query_ids = torch.arange(begin, block.stop, device=keys.device)
            visible = key_ids <= query_ids[:, None]
        part = attend(queries[:, block], keys, values, visible, scale)
        merge_(output[:, block], lse[:, block], *part)
