"""One step with drafts, on the device: what is verified, what follows from it, the next drafts.

The host knows neither lengths nor tokens of the rows meanwhile. Between steps a row has, beside
its tokens in KV, a last token without KV, and drafts: guesses for what follows that. A decode step
of draft length k is, for R rows:

    inputs = verify_inputs(state, rows, k)            # R * (k + 1) tokens
    hidden = hidden_states(model, inputs, ...)        # one pass, and the logits of all of them
    places = verify_places(state, rows, k)            # how each of them is sampled
    sampled = sample(logits, ..., *places)            # [R * (k + 1)] -> [R, k + 1]
    num_tokens = finish_decode(state, rows, sampled, hidden, kv, layer, k)
    penalties.record(..., kept(sampled, num_tokens))  # if any row has penalties

All but sampling and counting can be captured by (R, k). Each verify place is sampled like a row of
its own; its grammar mask is from `GrammarRows.look_ahead`, which needs the drafts on the host.
`sampled[r, :num_tokens[r]]` are the row's new tokens.

In a step that also has prompt chunks, `join_inputs` puts these first; after sampling `settle`
moves the decode rows on and `draft` runs the draft layer over the whole batch. A step without
drafts (k = 0) leaves the draft layer out, except for chunks, whose KV it needs later.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.attention.paged_rows import PagedRows
from ..kernels.sampling.noise import uniform
from ..kernels.sampling.speculative import accept, drafts_before
from .inputs import AttentionGroup, StepInputs
from .model.nextn import NextnWeights, draft_ids, nextn_states


@dataclass(frozen=True)
class RowState:
    """What a step reads and changes of every row, indexed by row number, on the device. `capacity`
    changes with the page table; whoever samples a row's first token sets `last_token` and adds it
    to `num_outputs`.

    `page_table` has columns for positions up to capacity + 2 * mtp_step of any row; those behind
    a row's pages may hold any page. KV of such positions goes to `scratch_slot`, for nobody.
    """

    last_token: Tensor  # [rows] int64
    lengths: Tensor  # [rows] int64: tokens with KV
    num_outputs: Tensor  # [rows] int64: sampled so far
    drafts: Tensor  # [rows, mtp_step] int64; those never made are any token ids
    capacity: Tensor  # [rows] int64: tokens that the row's pages hold
    page_table: Tensor  # [rows, pages] int32
    page_size: int
    scratch_slot: int
    backend: str = "auto"  # of attention, see `kernels/attention/backends.py`
    # [mtp_step] float64, descending: the share of steps in which the draft at each place is taken
    # for right, whatever it is. For benchmarks of weights that are noise; tokens are wrong then.
    forced: Tensor | None = None


@dataclass(frozen=True)
class DraftLayer:
    """The NextN layer and how it is used.

    Recurrent (eagle): one pass over the step's tokens, then each draft but the first is a pass over
    one token per row, fed with the layer's own state. Chained (vanilla): each draft is a pass over
    all the step's tokens, fed with the states of the pass before, with KV of its own.
    """

    weights: NextnWeights
    first_kv_layer: int
    num_kv_layers: int = 1
    is_chained: bool = False
    feeds_normed: bool = True  # its own states, after the norm that its head reads

    def run(
        self, inputs: StepInputs, hidden: Tensor, kv: Tensor, place: int = 0
    ) -> tuple[Tensor, Tensor]:
        """One pass -> (normed states, states to feed next). kv: all layers' pages."""
        own = kv[:, self.first_kv_layer + place]
        normed, raw = nextn_states(self.weights, inputs, hidden, own)
        return normed, normed if self.feeds_normed else raw

    def guess(self, normed: Tensor) -> Tensor:
        """normed [n, hidden] -> the likeliest tokens [n] int64."""
        return draft_ids(self.weights, normed)


class Places(NamedTuple):
    """Of verify places, row by row, what `sampler.sample` wants to know: whose they are [n], their
    output positions [n], and the drafts before each [n, k]; int64."""

    owners: Tensor
    positions: Tensor
    drafts: Tensor


def verify_places(state: RowState, rows: Tensor, num_drafts: int) -> Places:
    """Those of `rows` [n] int64 with `num_drafts` drafts each."""
    places = torch.arange(num_drafts + 1, device=rows.device)
    owners = rows[:, None].expand(-1, num_drafts + 1).flatten()
    positions = (state.num_outputs[rows, None] + places).flatten()
    return Places(owners, positions, drafts_before(state.drafts[rows, :num_drafts]))


def verify_inputs(state: RowState, rows: Tensor, num_drafts: int) -> StepInputs:
    """The last token and `num_drafts` drafts of each of `rows` [n] int64."""
    tokens = torch.cat((state.last_token[rows, None], state.drafts[rows, :num_drafts]), dim=1)
    return _row_inputs(state, rows, tokens, state.lengths[rows])


def join_inputs(chunks: StepInputs, decode: StepInputs) -> StepInputs:
    """Chunks and, behind them in the flat batch, the rows of `verify_inputs`. Sampling places are
    the chunks' and then every token of the others."""
    offset = len(chunks.token_ids)
    moved = [
        dataclasses.replace(g, span=slice(g.span.start + offset, g.span.stop + offset))
        for g in decode.groups
    ]
    return StepInputs(
        token_ids=torch.cat((chunks.token_ids, decode.token_ids)),
        positions=torch.cat((chunks.positions, decode.positions)),
        slots=torch.cat((chunks.slots, decode.slots)),
        groups=chunks.groups + moved,
        chunk_spans=chunks.chunk_spans,
        sampling_rows=chunks.sampling_rows + decode.sampling_rows,
        sampling_index=torch.cat((chunks.sampling_index, decode.sampling_index + offset)),
    )


def settle(state: RowState, rows: Tensor, sampled: Tensor) -> Tensor:
    """Accept drafts of `rows` by what was sampled [n, k + 1]: the rows move on.
    -> number of new tokens [n] int64, 1 to k + 1. A row never passes its pages."""
    lengths, capacity = state.lengths[rows], state.capacity[rows]
    drafts = state.drafts[rows, : sampled.shape[1] - 1]
    if state.forced is not None:
        chance = uniform(rows, state.num_outputs[rows])
        is_right = chance[:, None] < state.forced[: drafts.shape[1]]
        drafts = torch.where(is_right, sampled[:, :-1], -1)
    num_tokens, last = accept(sampled, drafts, capacity - lengths)
    state.last_token[rows] = last
    state.num_outputs[rows] += num_tokens
    state.lengths[rows] = torch.minimum(lengths + num_tokens, capacity)
    return num_tokens


def finish_decode(
    state: RowState,
    rows: Tensor,
    sampled: Tensor,
    hidden: Tensor,
    kv: Tensor,
    layer: DraftLayer,
    num_drafts: int,
) -> Tensor:
    """The rest of a step without chunks, once its tokens are sampled: `settle`, then new drafts.
    hidden [n * (k + 1), hidden]: the main model's states. -> as `settle`."""
    inputs = verify_inputs(state, rows, num_drafts)  # before lengths move
    num_tokens = settle(state, rows, sampled)
    if num_drafts:
        starts = torch.arange(len(rows), device=rows.device) * (num_drafts + 1)
        last = starts + num_tokens - 1
        draft(state, layer, inputs, hidden, kv, sampled.flatten(), rows, last, num_drafts)
    return num_tokens


def draft(
    state: RowState,
    layer: DraftLayer,
    inputs: StepInputs,
    hidden: Tensor,
    kv: Tensor,
    next_ids: Tensor,
    rows: Tensor,
    last: Tensor,
    num_drafts: int,
) -> None:
    """Run the draft layer over a step's flat batch, for its KV, and make `num_drafts` drafts for
    `rows` [n], whose last tokens with KV are at `last` [n] in the batch. hidden: the main model's
    states of the batch; next_ids: the token after each of the batch's (what was sampled there, or
    the known one). With num_drafts 0 for KV alone: rows and last are empty then.
    """
    normed, states = layer.run(dataclasses.replace(inputs, token_ids=next_ids), hidden, kv)
    if layer.is_chained:
        _chain(state, layer, inputs, normed, states, kv, next_ids, rows, last, num_drafts)
        return
    if not num_drafts:
        return
    states, positions = states[last], inputs.positions[last]
    ids = layer.guess(normed[last])
    state.drafts[rows, 0] = ids
    for place in range(1, num_drafts):
        positions = positions + 1
        step = _row_inputs(state, rows, ids[:, None], positions)
        normed, states = layer.run(step, states, kv)
        ids = layer.guess(normed)
        state.drafts[rows, place] = ids


def _chain(
    state: RowState,
    layer: DraftLayer,
    inputs: StepInputs,
    normed: Tensor,
    states: Tensor,
    kv: Tensor,
    next_ids: Tensor,
    rows: Tensor,
    last: Tensor,
    num_drafts: int,
) -> None:
    """The other passes of a chained layer: each sees tokens one place further on, the drafts so far
    among them. At the end of a chunk that is not a prompt's, they see a token of the next row."""
    has_chunks = bool(inputs.chunk_spans)  # their KV must be there for any later length
    num_passes = layer.num_kv_layers if has_chunks else num_drafts
    for place in range(num_passes):
        ids = layer.guess(normed[last])
        if place < num_drafts:
            state.drafts[rows, place] = ids
        if place + 1 < num_passes:
            next_ids = next_ids.roll(-1)
            next_ids[last] = ids
            step = dataclasses.replace(inputs, token_ids=next_ids)
            normed, states = layer.run(step, states, kv, place + 1)


def _row_inputs(state: RowState, rows: Tensor, tokens: Tensor, begins: Tensor) -> StepInputs:
    """tokens [n, width] of `rows` [n] at positions from begins [n] on."""
    count, width = tokens.shape
    size = state.page_size
    places = torch.arange(width, device=rows.device)
    positions = begins[:, None] + places
    page_table = state.page_table[rows]
    columns = (positions // size).clamp(max=page_table.shape[1] - 1)
    slots = page_table.gather(1, columns).long() * size + positions % size
    slots = torch.where(positions < state.capacity[rows, None], slots, state.scratch_slot)
    paged = PagedRows(
        page_table=page_table,
        query_starts=torch.arange(0, count * width + 1, width, device=rows.device),
        lengths=begins + width,
        max_query_len=width,
        max_length=page_table.shape[1] * size,
    )
    group = AttentionGroup(slice(0, count * width), True, paged, state.backend)
    return StepInputs(
        token_ids=tokens.flatten(),
        positions=positions.flatten(),
        slots=slots.flatten(),
        groups=[group],
        chunk_spans=[],
        sampling_rows=[],
        sampling_index=torch.arange(count * width, device=rows.device),
    )
