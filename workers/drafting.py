"""Runs plans of a server with drafts: what `mtp.py` does on the device, for a whole step at a time.

A decode row is sampled at several places of the step's flat batch: first the chunks that sample,
one place each, then `num_drafts + 1` places for each decode row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from ..kernels.sampling.speculative import kept
from ..shared.config import ServeConfig
from ..shared.messages import RowResult, StepPlan, TokenLogprob
from ..shared.model_spec import ModelSpec, num_kv_layers
from .graphs import DecodeGraphs
from .inputs import StepInputs, build_inputs
from .memory.device import to_device
from .model.glm4_moe_lite import ModelWeights, compute_logits, hidden_states
from .mtp import (
    DraftLayer,
    Places,
    RowState,
    draft,
    finish_decode,
    join_inputs,
    settle,
    verify_inputs,
    verify_places,
)
from .parallel import Ranks
from .rows import RowTable
from .sampling.grammars import GrammarRows
from .sampling.sampler import Masks

# (inputs) -> (normed states, states before the norm) of the main model
Forward = Callable[[StepInputs], tuple[Tensor, Tensor]]
# (logits of the sampling places, rows, masks, places) -> ids on every rank. Other ranks than the
# first have no logits.
Sample = Callable[[Tensor | None, Sequence[int], Masks | None, Places], Tensor]


@dataclass(frozen=True)
class Step:
    """How to read what a step sampled: decode rows keep the first `num_tokens` [rows]."""

    rows: list[int]  # of the places
    num_tokens: Tensor
    num_chunks: int
    num_drafts: int

    def results(
        self, ids: list[int], logprobs: Sequence[list[TokenLogprob]], num_tokens: list[int]
    ) -> tuple[list[RowResult], list[tuple[int, int]]]:
        """From the host's copies: a result for each chunk that sampled and each decode row, and
        (row, token) of all tokens that count, in their order."""
        width = self.num_drafts + 1
        begins = [*range(self.num_chunks)]
        begins += [self.num_chunks + i * width for i in range(len(num_tokens))]
        counts = [1] * self.num_chunks + num_tokens
        results, pairs = [], []
        for begin, count in zip(begins, counts, strict=True):
            span = slice(begin, begin + count)
            found = [one for entries in logprobs[span] for one in entries]
            results.append(RowResult(ids[span], found))
            pairs += [(self.rows[begin], i) for i in ids[span]]
        return results, pairs


class DraftSteps:
    """The draft layer and the rows' state that it needs beside the row table's."""

    def __init__(
        self,
        model: ModelWeights,
        spec: ModelSpec,
        config: ServeConfig,
        ranks: Ranks,
        table: RowTable,
        grammars: GrammarRows | None,
    ) -> None:
        assert model.nextn is not None, "weights were loaded without the draft layer"
        self._model, self._spec, self._ranks = model, spec, ranks
        self._table, self._grammars = table, grammars
        self._backends = config.llm_prefill_att_backend[0], config.llm_decode_att_backend[0]
        main, own = config.mtp_hidden_states[0], config.mtp_hidden_states[-1]
        self._feeds_normed = main == "after_norm"
        self.layer = DraftLayer(
            weights=model.nextn,
            first_kv_layer=spec.num_layers,
            num_kv_layers=num_kv_layers(spec, config) - spec.num_layers,
            is_chained=config.mtp_mode == "vanilla_with_att",
            feeds_normed=own == "after_norm",
        )
        self._drafts = torch.zeros(
            len(table.lengths), config.mtp_step, dtype=torch.int64, device=table.device
        )
        forced = config.mtp_forced_acceptance  # never in earnest, see `shared/resolve.py`
        self._forced = to_device(forced, torch.float64, table.device) if forced else None

    def state(self, scratch_page: int) -> RowState:
        """The rows on the device, with `scratch_page` for KV that is nobody's."""
        table = self._table
        return RowState(
            last_token=table.last_token,
            lengths=table.lengths,
            num_outputs=table.outputs_made,
            drafts=self._drafts,
            capacity=table.capacity,
            page_table=table.page_table,
            page_size=table.page_size,
            scratch_slot=scratch_page * table.page_size,
            backend=self._backends[1],
            forced=self._forced,
        )

    def verify(
        self, rows: Tensor, num_drafts: int, state: RowState, kv: Tensor, logits: Tensor
    ) -> tuple[Tensor, Places]:
        """What comes before sampling in a step without chunks, for `rows` [n] int64; fills logits
        [n * (num_drafts + 1), vocab]. -> (states that the draft layer is fed, sampling places)."""
        inputs = verify_inputs(state, rows, num_drafts)
        states = hidden_states(self._model, inputs, kv)
        compute_logits(self._model, states[0], logits)
        return states[0 if self._feeds_normed else 1], verify_places(state, rows, num_drafts)

    def finish(
        self,
        rows: Tensor,
        num_drafts: int,
        ids: Tensor,
        hidden: Tensor,
        state: RowState,
        kv: Tensor,
    ) -> Tensor:
        """What comes after it. -> number of new tokens [n] int64."""
        sampled = ids.view(len(rows), num_drafts + 1)
        return finish_decode(state, rows, sampled, hidden, kv, self.layer, num_drafts)

    def run(
        self,
        plan: StepPlan,
        state: RowState,
        kv: Tensor,
        forward: Forward,
        sample: Sample,
        read_pending: Callable[[], None],
        graphs: DecodeGraphs | None,
    ) -> Step:
        """Run a plan whose row changes were applied, and make the drafts for the next one.
        `read_pending` lets grammars know the tokens of the steps before."""
        table, num_drafts = self._table, plan.num_drafts
        index = to_device(plan.decode, torch.int64, table.device)
        chunk_rows = [chunk.row for chunk in plan.prefill if chunk.sample]
        rows = chunk_rows + [row for row in plan.decode for _ in range(num_drafts + 1)]

        def choose(logits: Tensor | None, places: Places) -> Tensor:
            masks = self._masks(chunk_rows, plan.decode, state, index, num_drafts, read_pending)
            return sample(logits, rows, masks, places)

        if not plan.prefill and graphs is not None and graphs.covers(len(plan.decode), num_drafts):
            logits, places = graphs.verify(plan.decode, num_drafts)
            ids = choose(logits if self._ranks.rank == 0 else None, places)
            num_tokens = graphs.finish(len(plan.decode), num_drafts, ids)
        else:
            verify = inputs = chunks = verify_inputs(state, index, num_drafts)
            if plan.prefill:
                alone = msgspec.structs.replace(plan, decode=[])
                chunks = build_inputs(alone, table, self._backends)
                inputs = join_inputs(chunks, verify) if plan.decode else chunks
            normed, raw = forward(inputs)
            hidden = normed if self._feeds_normed else raw
            first = verify_places(state, to_device(chunk_rows, torch.int64, table.device), 0)
            places = _join_places(first, verify_places(state, index, num_drafts))
            ids = places.owners
            if rows:
                sampling = normed[inputs.sampling_index]
                ids = choose(compute_logits(self._model, sampling), places)
            if not plan.prefill:
                num_tokens = self.finish(index, num_drafts, ids, hidden, state, kv)
            else:
                if not num_drafts:
                    inputs, hidden = chunks, hidden[: len(chunks.token_ids)]
                sampled = ids[len(chunk_rows) :].view(len(plan.decode), num_drafts + 1)
                num_tokens = self._settle(plan, state, inputs, ids, sampled, index, hidden, kv)
        if table.rules.penalties.concerns(rows):
            sampled = ids[len(chunk_rows) :].view(len(plan.decode), num_drafts + 1)
            counted = torch.cat((ids[: len(chunk_rows)], kept(sampled, num_tokens).flatten()))
            table.rules.penalties.record(rows, places.owners, counted)
        table.expect_outputs(plan.decode)  # not before: rules of the first outputs ask for it
        return Step(rows, num_tokens, len(chunk_rows), num_drafts)

    def _settle(
        self,
        plan: StepPlan,
        state: RowState,
        inputs: StepInputs,
        ids: Tensor,
        sampled: Tensor,
        index: Tensor,
        hidden: Tensor,
        kv: Tensor,
    ) -> Tensor:
        """The rest of a step with chunks: rows move on, the draft layer runs over the inputs, which
        are the chunks alone if the step makes no drafts."""
        table, device = self._table, self._table.device
        num_tokens = settle(state, index, sampled)
        chunk_rows = [chunk.row for chunk in plan.prefill if chunk.sample]
        chunk_index = to_device(chunk_rows, torch.int64, device)
        state.last_token[chunk_index] = ids[: len(chunk_rows)]
        state.num_outputs[chunk_index] += 1
        table.expect_outputs(chunk_rows)
        counts = [len(chunk.token_ids) for chunk in plan.prefill]
        table.advance([chunk.row for chunk in plan.prefill], counts)
        # The token after each of the batch's: known ones, then what was sampled.
        known = [0] * sum(counts)
        for chunk, span in zip(plan.prefill, inputs.chunk_spans, strict=True):
            known[span] = [*chunk.token_ids[1:], max(0, chunk.next_id)]
        next_ids = to_device(known, torch.int64, device)
        at = inputs.sampling_index[: len(chunk_rows)]
        next_ids[at] = ids[: len(chunk_rows)]
        rows, last = index[:0], at[:0]
        num_drafts = plan.num_drafts if chunk_rows or plan.decode else 0
        if num_drafts:
            next_ids = torch.cat((next_ids, sampled.flatten()))
            starts = torch.arange(len(index), device=device) * sampled.shape[1] + sum(counts)
            rows, last = torch.cat((chunk_index, index)), torch.cat((at, starts + num_tokens - 1))
        draft(state, self.layer, inputs, hidden, kv, next_ids, rows, last, num_drafts)
        return num_tokens

    def _masks(
        self,
        chunk_rows: list[int],
        decode: list[int],
        state: RowState,
        index: Tensor,
        num_drafts: int,
        read_pending: Callable[[], None],
    ) -> Masks | None:
        """Grammar masks of all places; those behind a draft need it on the host."""
        grammars = self._grammars
        if grammars is None or grammars.rows.isdisjoint((*chunk_rows, *decode)):
            return None
        read_pending()
        drafts = state.drafts[index, :num_drafts].tolist()
        places, found = grammars.masks(chunk_rows)
        masks = [found]
        for number, row in enumerate(decode):
            if row in grammars.rows:
                begin = len(chunk_rows) + number * (num_drafts + 1)
                places += range(begin, begin + num_drafts + 1)
                masks.append(grammars.look_ahead(row, drafts[number]))
        return places, torch.cat(masks)


def _join_places(chunks: Places, decode: Places) -> Places:
    """Chunks have no drafts before their places."""
    none = decode.drafts.new_full((len(chunks.owners), decode.drafts.shape[1]), -1)
    return Places(
        torch.cat((chunks.owners, decode.owners)),
        torch.cat((chunks.positions, decode.positions)),
        torch.cat((none, decode.drafts)),
    )
