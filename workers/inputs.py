"""Turns a plan into the tensors of one forward pass. Decides per row how attention is computed;
does nothing else, so it is easy to test."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..shared.messages import PrefillChunk, StepPlan
from .rows import RowTable

# An extension of a cached prefix by so many tokens is cheaper absorbed: up-projecting one cached
# token costs as much as the dearer absorbed scores of about 512 queries.
ABSORBED_MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class AttentionGroup:
    """Rows whose attention is computed by one call; their tokens are `span` of the flat batch."""

    span: slice
    absorbed: bool
    page_table: Tensor  # [num_rows, pages] int32
    query_starts: Tensor  # [num_rows + 1] int64, relative to span
    lengths: Tensor  # [num_rows] int64, new tokens included
    max_query_len: int
    max_length: int


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


def build_inputs(plan: StepPlan, table: RowTable) -> StepInputs:
    """Inputs for a plan whose row changes have been applied. Raises ValueError if a chunk does
    not continue its row or a row's pages are too few: a wrong plan must not corrupt other rows."""
    chunks = sorted(enumerate(plan.prefill), key=lambda item: _is_absorbed(item[1]))
    num_long = sum(not _is_absorbed(chunk) for chunk in plan.prefill)
    ordered = [chunk for _, chunk in chunks]
    for chunk in ordered:
        if chunk.start != table.num_tokens[chunk.row]:
            have = table.num_tokens[chunk.row]
            raise ValueError(
                f"row {chunk.row} has {have} tokens, its chunk starts at {chunk.start}"
            )
        table.check_room(chunk.row, len(chunk.token_ids))
    for row in plan.decode:
        table.check_room(row, 1)
    rows = [chunk.row for chunk in ordered] + plan.decode
    counts = [len(chunk.token_ids) for chunk in ordered] + [1] * len(plan.decode)
    device = table.lengths.device
    row_of_token = torch.tensor(rows, device=device).repeat_interleave(
        torch.tensor(counts, device=device)
    )
    decode = torch.tensor(plan.decode, dtype=torch.int64, device=device)
    known = [i for chunk in ordered for i in chunk.token_ids]
    places = [p for c in ordered for p in range(c.start, c.start + len(c.token_ids))]
    token_ids = torch.cat((_ints(known, device), table.last_token[decode]))
    positions = torch.cat((_ints(places, device), table.lengths[decode]))
    pages = table.page_table[row_of_token, positions // table.page_size].long()
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    bounds = (0, num_long, len(ordered), len(rows))
    spans = {at: slice(*starts[i : i + 2]) for i, (at, _) in enumerate(chunks)}
    last = [spans[i].stop - 1 for i, chunk in enumerate(plan.prefill) if chunk.sample]
    return StepInputs(
        token_ids=token_ids,
        positions=positions,
        slots=pages * table.page_size + positions % table.page_size,
        groups=[
            _group(table, rows[a:b], starts[a : b + 1], absorbed=kind > 0)
            for kind, (a, b) in enumerate(pairwise(bounds))
            if a < b
        ],
        chunk_spans=[spans[i] for i in range(len(plan.prefill))],
        sampling_rows=[c.row for c in plan.prefill if c.sample] + plan.decode,
        sampling_index=_ints([*last, *range(starts[len(ordered)], starts[-1])], device),
    )


def _is_absorbed(chunk: PrefillChunk) -> bool:
    return chunk.start > 0 and len(chunk.token_ids) <= ABSORBED_MAX_NEW_TOKENS


def _group(table: RowTable, rows: list[int], starts: list[int], absorbed: bool) -> AttentionGroup:
    counts = [b - a for a, b in pairwise(starts)]
    lengths = [table.num_tokens[row] + n for row, n in zip(rows, counts, strict=True)]
    device = table.lengths.device
    num_pages = -(-max(lengths) // table.page_size)
    return AttentionGroup(
        span=slice(starts[0], starts[-1]),
        absorbed=absorbed,
        page_table=table.page_table[_ints(rows, device), :num_pages],
        query_starts=_ints([start - starts[0] for start in starts], device),
        lengths=_ints(lengths, device),
        max_query_len=max(counts),
        max_length=max(lengths),
    )


def _ints(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
