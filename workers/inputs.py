"""Turns a plan into the tensors of one forward pass. Decides per row how attention is computed;
does nothing else, so it is easy to test."""

from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from ..kernels.attention.flashinfer_mla import FlashInferDecode
from ..kernels.attention.paged_rows import PagedRows
from ..shared.messages import PrefillChunk, StepPlan
from .memory.device import ints_to_device
from .rows import RowTable

# An extension of a cached prefix by so many tokens is cheaper absorbed: up-projecting one cached
# token costs as much as the dearer absorbed scores of about 512 queries.
ABSORBED_MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class AttentionGroup:
    """Rows whose attention is computed by one call; their tokens are `span` of the flat batch."""

    span: slice
    absorbed: bool
    rows: PagedRows  # query starts are relative to span
    backend: str = "auto"  # as asked for, see `kernels/attention/backends.py`
    planned: FlashInferDecode | None = None  # planned for these rows; it runs instead


@dataclass(frozen=True)
class StepInputs:
    """One step. Flat order: up-projected chunks, absorbed chunks, decode rows."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slots: Tensor  # [num_tokens] int64: where the latents go, page * page_size + offset
    groups: list[AttentionGroup]
    chunk_spans: list[slice]  # of the flat batch, parallel to plan.prefill
    sampling_rows: list[int]  # in the order of StepResult.rows
    sampling_index: Tensor  # [len(sampling_rows)] int64: their last tokens in the flat batch


def decode_inputs(
    rows: Tensor,
    table: RowTable,
    backend: str = "auto",
    planned: FlashInferDecode | None = None,
) -> StepInputs:
    """One token of each row [n] int64, the row's last one, from the device's state alone: what a
    CUDA graph captures. Attention gets the loosest bound on lengths."""
    positions = table.lengths[rows]
    page_table = table.page_table[rows]
    everyone = torch.arange(len(rows) + 1, device=rows.device)
    paged = PagedRows(
        page_table=page_table,
        query_starts=everyone,
        lengths=positions + 1,
        max_query_len=1,
        max_length=page_table.shape[1] * table.page_size,
    )
    group = AttentionGroup(slice(0, len(rows)), True, paged, backend, planned)
    pages = page_table.gather(1, (positions // table.page_size)[:, None]).squeeze(1).long()
    slots = pages * table.page_size + positions % table.page_size
    tokens = table.last_token[rows]
    return StepInputs(tokens, positions, slots, [group], [], [], everyone[:-1])


def build_inputs(
    plan: StepPlan, table: RowTable, backends: tuple[str, str] = ("auto", "auto")
) -> StepInputs:
    """Inputs for a plan whose row changes have been applied; `backends` as asked for, of
    up-projected and of absorbed attention. Raises ValueError if a chunk does
    not continue its row or a row's pages are too few: a wrong plan must not corrupt other rows."""
    chunks = sorted(enumerate(plan.prefill), key=lambda item: _is_absorbed(item[1]))
    num_long = sum(not _is_absorbed(chunk) for chunk in plan.prefill)
    ordered = [chunk for _, chunk in chunks]
    _check(plan, table)
    rows = [chunk.row for chunk in ordered] + plan.decode
    counts = [len(chunk.token_ids) for chunk in ordered] + [1] * len(plan.decode)
    begins = [table.num_tokens[row] for row in rows]
    lengths = [begin + count for begin, count in zip(begins, counts, strict=True)]
    starts = list(accumulate(counts, initial=0))
    spans = {at: slice(*starts[i : i + 2]) for i, (at, _) in enumerate(chunks)}
    last = [spans[i].stop - 1 for i, chunk in enumerate(plan.prefill) if chunk.sample]
    sampling = [*last, *range(starts[len(ordered)], starts[-1])]
    # All in one copy: rows and positions of tokens, known tokens, then what is per row.
    row_of_token = chain.from_iterable([row] * n for row, n in zip(rows, counts, strict=True))
    positions = chain.from_iterable(range(a, b) for a, b in zip(begins, lengths, strict=True))
    known = chain.from_iterable(chunk.token_ids for chunk in ordered)
    packed = ints_to_device(
        [*row_of_token, *positions, *known, *plan.decode, *rows, *lengths, *starts, *sampling],
        table.device,
    )
    total, num_rows = starts[-1], len(rows)
    sizes = [total, total, total, num_rows, num_rows, num_rows + 1, len(sampling)]
    of_token, at, tokens, row_index, length, start, sampling_index = packed.split(sizes)
    first_decode = starts[len(ordered)]
    tokens = torch.cat((tokens[:first_decode], table.last_token[tokens[first_decode:]]))
    pages = table.page_table[of_token, at // table.page_size].long()

    def group(a: int, b: int, absorbed: bool) -> AttentionGroup:
        longest = max(lengths[a:b])
        num_pages = -(-longest // table.page_size)
        paged = PagedRows(
            page_table=table.page_table[row_index[a:b], :num_pages],
            query_starts=start[a : b + 1] - starts[a],
            lengths=length[a:b],
            max_query_len=max(counts[a:b]),
            max_length=longest,
            query_lens=tuple(counts[a:b]),
            prefix_lens=tuple(begins[a:b]),
        )
        return AttentionGroup(slice(starts[a], starts[b]), absorbed, paged, backends[absorbed])

    bounds = (0, num_long, len(ordered), num_rows)
    return StepInputs(
        token_ids=tokens,
        positions=at,
        slots=pages * table.page_size + at % table.page_size,
        groups=[group(a, b, kind > 0) for kind, (a, b) in enumerate(pairwise(bounds)) if a < b],
        chunk_spans=[spans[i] for i in range(len(plan.prefill))],
        sampling_rows=[c.row for c in plan.prefill if c.sample] + plan.decode,
        sampling_index=sampling_index,
    )


def _is_absorbed(chunk: PrefillChunk) -> bool:
    return chunk.start > 0 and len(chunk.token_ids) <= ABSORBED_MAX_NEW_TOKENS


def _check(plan: StepPlan, table: RowTable) -> None:
    for chunk in plan.prefill:
        have = table.num_tokens[chunk.row]
        if chunk.start != have:
            raise ValueError(
                f"row {chunk.row} has {have} tokens, its chunk starts at {chunk.start}"
            )
        table.check_room(chunk.row, len(chunk.token_ids))
    for row in plan.decode:
        table.check_room(row, 1)
