"""Speculative decoding on the device: which drafts are accepted, and the next drafts.

Between steps a row has, beside its tokens in KV, a last token without KV and drafts: guesses for
the tokens after it. A decode step with k drafts runs the last token and k drafts of each row
through the model at once and samples a token at each of these k + 1 positions, exactly as it would
without drafts. Draft i is accepted if it equals the token sampled at position i-1. The sampled
tokens up to and including the first one after a draft that is not accepted are the row's new
tokens; KV of the drafts after that is invalid and is overwritten before it is read.

Then the draft layer runs over the step's tokens, for its own KV and for the next k drafts. A step
with k = 0 runs it over chunks of prompts only, whose KV later drafts need. The host knows neither
lengths nor tokens of the rows meanwhile, and everything here but steps with chunks can be captured
in CUDA graphs.
"""

import dataclasses

import torch
from torch import Tensor

from ..kernels.sampling import speculative
from ..kernels.sampling.sampling import uniform
from ..shared.config import ServeConfig
from ..shared.model_spec import num_kv_layers
from .inputs import Backends, StepBatch, StepInputs, row_inputs
from .memory.device import to_device
from .model.nextn import NextnWeights, draft_ids, nextn_states
from .rows import RowTable


def accept(table: RowTable, rows: Tensor, sampled: Tensor, forced: Tensor | None = None) -> Tensor:
    """Accept drafts of `rows` [n] by the sampled tokens [n, k + 1], and move the rows on.
    -> number of new tokens [n] int64, 1 to k + 1. A row never passes its pages.

    forced [at least k] float64, descending: for benchmarks on random weights, the share of steps in
    which each draft is accepted whatever it is; tokens are wrong then."""
    lengths, capacity = table.lengths[rows], table.capacity[rows]
    drafts = table.drafts[rows, : sampled.shape[1] - 1]
    if forced is not None:
        chance = uniform(rows, table.num_outputs[rows])
        is_accepted = chance[:, None] < forced[: drafts.shape[1]]
        drafts = torch.where(is_accepted, sampled[:, :-1], -1)
    num_tokens, last = speculative.accept(sampled, drafts, capacity - lengths)
    table.last_token[rows] = last
    table.num_outputs[rows] += num_tokens
    table.lengths[rows] = torch.minimum(lengths + num_tokens, capacity)
    return num_tokens


class Drafter:
    """The NextN layer and how it is used.

    Recurrent (eagle): one pass over the step's tokens, then each draft but the first is a pass over
    one token per row, fed with the layer's own state. Chained (vanilla): each draft is a pass over
    all the step's tokens, fed with the states of the pass before, with KV of its own.
    """

    def __init__(self, weights: NextnWeights, config: ServeConfig, table: RowTable) -> None:
        self._weights, self._table = weights, table
        main, recurrent = config.mtp_hidden_states[0], config.mtp_hidden_states[-1]
        self.is_fed_normed = main == "after_norm"  # which states of the main model it is fed
        self._feeds_normed = recurrent == "after_norm"  # which of its own
        self._is_chained = config.mtp_mode == "vanilla_with_att"
        self._first_kv_layer = weights.spec.num_layers
        self._num_kv_layers = num_kv_layers(weights.spec, config) - weights.spec.num_layers
        self._backends = Backends(decode=config.llm_decode_att_backend[0])
        forced = config.mtp_forced_acceptance  # for benchmarks only, see `shared/resolve.py`
        self._forced = to_device(forced, torch.float64, table.device) if forced else None

    def accept(self, rows: Tensor, ids: Tensor, num_drafts: int) -> Tensor:
        """`accept` of sampled ids [n * (num_drafts + 1)] for rows [n]."""
        return accept(self._table, rows, ids.view(-1, num_drafts + 1), self._forced)

    def finish(
        self, batch: StepBatch, hidden: Tensor, kv: Tensor, ids: Tensor, num_drafts: int
    ) -> Tensor:
        """The rest of a step once its tokens `ids` [num_points] int64 are sampled: accept drafts,
        run the draft layer, make `num_drafts` drafts for every row that sampled. hidden
        [num_tokens, hidden]: the main model's states. kv: all layers' pages.
        -> as `accept`, for the decode rows."""
        packed, points = batch.packed, batch.points.rows
        if packed is None:
            rows = points.view(-1, num_drafts + 1)[:, 0].contiguous()
            return self.finish_decode(rows, batch.inputs, hidden, kv, ids, num_drafts)
        assert batch.sampling_index is not None
        count = packed.num_chunk_points
        chunk_rows = points[:count]
        rows = points[count:].view(-1, num_drafts + 1)[:, 0].contiguous()
        num_tokens = self.accept(rows, ids[count:], num_drafts)
        self._table.advance(packed.rows, packed.added)
        self._table.last_token[chunk_rows] = ids[:count]
        next_ids, last = packed.next_ids, batch.sampling_index[:count]
        next_ids[last] = ids[:count]
        inputs, offset = batch.inputs, len(next_ids)
        if num_drafts and len(points):
            last = torch.cat((last, offset + _last_accepted(num_tokens, num_drafts)))
            next_ids = torch.cat((next_ids, ids[count:]))
            rows = torch.cat((chunk_rows, rows))
        else:  # for the chunks' KV alone
            inputs, hidden, num_drafts = inputs.cut(offset), hidden[:offset], 0
            rows, last = rows[:0], last[:0]
        inputs = dataclasses.replace(inputs, token_ids=next_ids)
        self.draft(inputs, hidden, kv, rows, last, num_drafts)
        return num_tokens

    def finish_decode(
        self,
        rows: Tensor,
        inputs: StepInputs,
        hidden: Tensor,
        kv: Tensor,
        ids: Tensor,
        num_drafts: int,
    ) -> Tensor:
        """`finish` of a step that only decodes `rows` [n] with drafts; a CUDA graph can capture it.
        Their inputs are from before the step."""
        num_tokens = self.accept(rows, ids, num_drafts)
        if num_drafts:
            last = _last_accepted(num_tokens, num_drafts)
            inputs = dataclasses.replace(inputs, token_ids=ids)
            self.draft(inputs, hidden, kv, rows, last, num_drafts)
        return num_tokens

    def draft(
        self,
        inputs: StepInputs,
        hidden: Tensor,
        kv: Tensor,
        rows: Tensor,
        last: Tensor,
        num_drafts: int,
    ) -> None:
        """Run the draft layer over a step's flat batch, for its KV, and make `num_drafts` drafts
        for `rows` [n], whose last tokens with KV are at `last` [n] in the batch. The inputs' token
        ids are each position's next token, sampled or known. With num_drafts 0 rows and last are
        empty, and the layer runs for its KV alone."""
        normed, states = self.run(inputs, hidden, kv)
        if self._is_chained:
            self._chain(inputs, (normed, states), kv, rows, last, num_drafts)
            return
        if not num_drafts:
            return
        states, positions = states[last], inputs.positions[last]
        ids = self.guess(normed[last])
        self._table.drafts[rows, 0] = ids
        for number in range(1, num_drafts):
            positions = positions + 1
            step = row_inputs(self._table, rows, ids[:, None], positions, self._backends)
            normed, states = self.run(step, states, kv)
            ids = self.guess(normed)
            self._table.drafts[rows, number] = ids

    def _chain(
        self,
        inputs: StepInputs,
        output: tuple[Tensor, Tensor],
        kv: Tensor,
        rows: Tensor,
        last: Tensor,
        num_drafts: int,
    ) -> None:
        """The other passes of a chained layer: each sees tokens one position further on, the drafts
        so far among them. At the end of a chunk that is not a prompt's end, they see a token of the
        next row."""
        normed, states = output
        next_ids, has_chunks = inputs.token_ids, bool(inputs.groups[0].rows.query_lens)
        # KV of chunks must be there for any later number of drafts.
        num_passes = self._num_kv_layers if has_chunks else num_drafts
        for number in range(num_passes):
            ids = self.guess(normed[last])
            if number < num_drafts:
                self._table.drafts[rows, number] = ids
            if number + 1 < num_passes:
                next_ids = next_ids.roll(-1)
                next_ids[last] = ids
                step = dataclasses.replace(inputs, token_ids=next_ids)
                normed, states = self.run(step, states, kv, number + 1)

    def run(
        self, inputs: StepInputs, hidden: Tensor, kv: Tensor, number: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Pass `number` of the layer -> (normed states, states to feed next)."""
        layer_kv = kv[:, self._first_kv_layer + number]
        normed, raw = nextn_states(self._weights, inputs, hidden, layer_kv)
        return normed, normed if self._feeds_normed else raw

    def guess(self, normed: Tensor) -> Tensor:
        """normed [n, hidden] -> the likeliest tokens [n] int64."""
        return draft_ids(self._weights, normed)


def _last_accepted(num_tokens: Tensor, num_drafts: int) -> Tensor:
    """Where each row's last token with KV is in a flat batch of decode rows [n] int64."""
    starts = torch.arange(len(num_tokens), device=num_tokens.device) * (num_drafts + 1)
    return starts + num_tokens - 1
