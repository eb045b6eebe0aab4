"""Turns a plan into the tensors of one forward pass, and decides how each row attends."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.attention.flashinfer_mla import FlashInferDecode
from ..kernels.attention.paged_rows import PagedRows
from ..kernels.sampling.speculative import drafts_before
from ..shared.messages import PrefillChunk, StepPlan
from .memory.device import ints_to_device, to_device
from .rows import RowTable

# An extension of a cached prefix by so many tokens is cheaper absorbed: up-projecting one cached
# token costs as much as the more expensive absorbed scores of about 512 queries.
ABSORBED_MAX_NEW_TOKENS = 512


class Backends(NamedTuple):
    """Implementations of attention as asked for, see `kernels/attention/backends.py`."""

    prefill: str = "auto"  # of up-projected attention
    decode: str = "auto"  # of absorbed attention
    planned: FlashInferDecode | None = None  # runs decode rows instead, once planned for them


AUTO = Backends()


@dataclass(frozen=True)
class AttentionGroup:
    """Rows whose attention is computed by one call; their tokens are `span` of the flat batch."""

    span: slice
    absorbed: bool
    rows: PagedRows  # query starts are relative to span
    backend: str = "auto"  # as asked for, see `kernels/attention/backends.py`
    planned: FlashInferDecode | None = None  # planned for these rows; it runs instead


class SamplingPoints(NamedTuple):
    """Where a step samples a token; one point may depend on the drafts before it. int64."""

    rows: Tensor  # [n]: the row of each
    positions: Tensor  # [n]: outputs of the row before this one
    drafts: Tensor | None = None  # [n, k]: the drafts before each, -1 for none; None: k is 0


@dataclass(frozen=True)
class StepInputs:
    """Inputs of one forward pass. Flat order: up-projected chunks, absorbed chunks, decode rows."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slots: Tensor  # [num_tokens] int64: where the latents go, page * page_size + offset
    groups: list[AttentionGroup]

    def cut(self, num_tokens: int) -> "StepInputs":
        """The first `num_tokens`, whole groups."""
        return StepInputs(
            self.token_ids[:num_tokens],
            self.positions[:num_tokens],
            self.slots[:num_tokens],
            [group for group in self.groups if group.span.stop <= num_tokens],
        )


@dataclass(frozen=True)
class PackedRows:
    """The rows of a step whose lengths the host knows: chunks, and decode rows without drafts."""

    rows: Tensor  # [num_rows] int64
    added: Tensor  # [2, num_rows] int64: tokens with KV and outputs that each of them gains
    chunk_spans: Sequence[slice]  # of the flat batch, parallel to plan.prefill
    num_chunk_points: int  # chunks that sample
    next_ids: Tensor  # [chunk tokens] int64, with drafts: the token after each chunk token


@dataclass(frozen=True)
class StepBatch:
    """A step's tokens, and where it samples: in the order of StepResult.rows, the chunks that
    sample, one point each, then for each decode row its last token and its drafts."""

    inputs: StepInputs
    points: SamplingPoints
    sampling_index: Tensor | None = None  # [num_points] int64, in the flat batch; None: all tokens
    packed: PackedRows | None = None


def build_batch(plan: StepPlan, table: RowTable, backends: Backends = AUTO) -> StepBatch:
    """The batch of a plan whose row changes have been applied. Raises ValueError if a chunk does
    not continue its row or a row's pages are too few: a wrong plan must not corrupt other rows."""
    for chunk in plan.prefill:
        num_tokens = table.min_tokens[chunk.row]
        if chunk.start != num_tokens:
            raise ValueError(
                f"row {chunk.row} has {num_tokens} tokens, its chunk starts at {chunk.start}"
            )
        table.check_room(chunk.row, len(chunk.token_ids))
    if table.max_drafts:
        return _batch_with_drafts(plan, table, backends)
    for row in plan.decode:
        table.check_room(row, 1)
    return _pack(plan.prefill, plan.decode, table, backends)


def _batch_with_drafts(plan: StepPlan, table: RowTable, backends: Backends) -> StepBatch:
    """The host does not know the lengths of decode rows."""
    if not plan.decode:
        return _pack(plan.prefill, [], table, backends)
    rows = to_device(plan.decode, torch.int64, table.device)
    decode = decode_batch(table, rows, plan.num_drafts, backends)
    if not plan.prefill:
        return decode
    return _join(_pack(plan.prefill, [], table, backends), decode)


def decode_batch(
    table: RowTable, rows: Tensor, num_drafts: int = 0, backends: Backends = AUTO
) -> StepBatch:
    """A batch of decode rows [n] int64 with `num_drafts` drafts each, from the device's state
    alone: a CUDA graph can capture it."""
    inputs, outputs = decode_inputs(table, rows, num_drafts, backends), table.num_outputs[rows]
    if not num_drafts:
        return StepBatch(inputs, SamplingPoints(rows, outputs))
    offsets = torch.arange(num_drafts + 1, device=rows.device)
    points = SamplingPoints(
        rows[:, None].expand(-1, num_drafts + 1).flatten(),
        (outputs[:, None] + offsets).flatten(),
        drafts_before(table.drafts[rows, :num_drafts]),
    )
    return StepBatch(inputs, points)


def decode_inputs(table: RowTable, rows: Tensor, num_drafts: int, backends: Backends) -> StepInputs:
    """The last token and `num_drafts` drafts of each of `rows` [n] int64."""
    tokens = table.last_token[rows][:, None]
    if num_drafts:
        tokens = torch.cat((tokens, table.drafts[rows, :num_drafts]), dim=1)
    return row_inputs(table, rows, tokens, table.lengths[rows], backends)


def row_inputs(
    table: RowTable, rows: Tensor, tokens: Tensor, begins: Tensor, backends: Backends
) -> StepInputs:
    """tokens [n, width] of `rows` [n] at positions from begins [n] on; int64. Attention gets the
    loosest bound on lengths."""
    count, width = tokens.shape
    size, positions = table.page_size, begins[:, None]
    if width > 1:
        positions = positions + torch.arange(width, device=rows.device)
    page_table = table.page_table[rows]
    slots = page_table.gather(1, positions // size).long() * size + positions % size
    if table.max_drafts:  # the host has not checked that the row's pages hold these positions
        slots = torch.where(positions < table.capacity[rows, None], slots, table.scratch_slot)
    paged = PagedRows(
        page_table=page_table,
        query_starts=torch.arange(0, count * width + 1, width, device=rows.device),
        lengths=begins + width,
        max_query_len=width,
        max_length=page_table.shape[1] * size,
    )
    span = slice(0, count * width)
    group = AttentionGroup(span, True, paged, backends.decode, backends.planned)
    return StepInputs(tokens.flatten(), positions.flatten(), slots.flatten(), [group])


def _pack(
    prefill: Sequence[PrefillChunk], decode: list[int], table: RowTable, backends: Backends
) -> StepBatch:
    """Chunks, and decode rows of one token each, whose lengths the host knows. One copy to the
    device holds everything."""
    chunks = sorted(prefill, key=_is_absorbed)
    rows = [chunk.row for chunk in chunks] + decode
    begins = [table.min_tokens[row] for row in rows]
    counts = [len(chunk.token_ids) for chunk in chunks] + [1] * len(decode)
    lengths = [begin + count for begin, count in zip(begins, counts, strict=True)]
    starts = list(accumulate(counts, initial=0))
    spans = {row: slice(*bounds) for row, bounds in zip(rows, pairwise(starts), strict=True)}
    sampled_rows = [chunk.row for chunk in prefill if chunk.sample] + decode
    parts: list[Sequence[int]] = [
        sampled_rows,  # first, and so aligned: kernels are compiled for aligned row numbers
        _flat([row] * count for row, count in zip(rows, counts, strict=True)),
        _flat(map(range, begins, lengths)),
        _flat([*(chunk.token_ids for chunk in chunks), decode]),  # decode rows: see below
        rows,
        lengths,
        starts,
        [*counts, *(chunk.sample for chunk in chunks), *[1] * len(decode)],
        [spans[row].stop - 1 for row in sampled_rows],
        _flat(map(_next_ids, chunks)) if table.max_drafts else [],
    ]
    packed = ints_to_device(_flat(parts), table.device)
    sampled, of_token, at, tokens, row, length, start, added, index, next_ids = packed.split(
        [len(part) for part in parts]
    )
    if decode:  # only the device knows their tokens
        tokens[-len(decode) :] = table.last_token[row[len(chunks) :]]
    size = table.page_size
    slots = table.page_table[of_token, at // size].long() * size + at % size

    def group(a: int, b: int, kind: int) -> AttentionGroup:
        longest = max(lengths[a:b])
        paged = PagedRows(
            page_table=table.page_table[row[a:b], : -(-longest // size)],
            query_starts=start[a : b + 1] - starts[a],
            lengths=length[a:b],
            max_query_len=max(counts[a:b]),
            max_length=longest,
            query_lens=tuple(counts[a:b]),
            prefix_lens=tuple(begins[a:b]),
        )
        backend = backends.decode if kind else backends.prefill
        planned = backends.planned if kind == 2 else None
        return AttentionGroup(slice(starts[a], starts[b]), kind > 0, paged, backend, planned)

    bounds = (0, sum(not _is_absorbed(chunk) for chunk in chunks), len(chunks), len(rows))
    groups = [group(a, b, kind) for kind, (a, b) in enumerate(pairwise(bounds)) if a < b]
    chunk_spans = [spans[chunk.row] for chunk in prefill]
    num_chunk_points = len(sampled_rows) - len(decode)
    return StepBatch(
        StepInputs(tokens, at, slots, groups),
        SamplingPoints(sampled, table.num_outputs[sampled]),
        index,
        PackedRows(row, added.view(2, -1), chunk_spans, num_chunk_points, next_ids),
    )


def _flat(parts: Iterable[Iterable[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def _is_absorbed(chunk: PrefillChunk) -> bool:
    return chunk.start > 0 and len(chunk.token_ids) <= ABSORBED_MAX_NEW_TOKENS


def _next_ids(chunk: PrefillChunk) -> list[int]:
    """The token after each token of the chunk; 0 if it will be sampled."""
    return [*chunk.token_ids[1:], max(0, chunk.next_id)]


def _join(chunks: StepBatch, decode: StepBatch) -> StepBatch:
    """The decode rows after the chunks."""
    assert chunks.packed is not None
    assert chunks.sampling_index is not None
    first, second, drafts = chunks.inputs, decode.inputs, decode.points.drafts
    offset = len(first.token_ids)
    moved = [
        dataclasses.replace(g, span=slice(g.span.start + offset, g.span.stop + offset))
        for g in second.groups
    ]
    if drafts is not None:  # there are none before the points of chunks
        none = drafts.new_full((len(chunks.points.rows), drafts.shape[1]), -1)
        drafts = torch.cat((none, drafts))
    inputs = StepInputs(
        token_ids=torch.cat((first.token_ids, second.token_ids)),
        positions=torch.cat((first.positions, second.positions)),
        slots=torch.cat((first.slots, second.slots)),
        groups=first.groups + moved,
    )
    points = SamplingPoints(
        torch.cat((chunks.points.rows, decode.points.rows)),
        torch.cat((chunks.points.positions, decode.points.positions)),
        drafts,
    )
    decoded = torch.arange(offset, len(inputs.token_ids), device=inputs.token_ids.device)
    index = torch.cat((chunks.sampling_index, decoded))
    return StepBatch(inputs, points, index, chunks.packed)
