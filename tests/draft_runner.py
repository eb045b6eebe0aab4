"""A plain runner of plans with drafts, on the CPU: the row bookkeeping around `workers/mtp.py`, so
that scheduler and device code can be tested together without processes and graphs."""

from pathlib import Path
from typing import Any

import torch
from glimmer.kernels.speculative import kept
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import RowResult, StepPlan, StepResult
from glimmer.shared.model_spec import load_model_spec, num_kv_layers
from glimmer.workers.checkpoint import check_draft, check_weights
from glimmer.workers.inputs import build_inputs
from glimmer.workers.kv_cache import pages_per_row
from glimmer.workers.model.glm4_moe_lite import compute_logits, hidden_states
from glimmer.workers.mtp import (
    DraftLayer,
    Places,
    RowState,
    draft,
    join_inputs,
    settle,
    verify_inputs,
    verify_places,
)
from glimmer.workers.parallel import Ranks
from glimmer.workers.rows import RowTable
from glimmer.workers.sampler import sample
from glimmer.workers.weights import load_weights
from torch import Tensor


class DraftRunner:
    """Rank 0 alone, without grammars and log-probabilities. `num_accepted` counts drafts."""

    def __init__(self, model_dir: Path, config: ServeConfig, num_pages: int) -> None:
        self.spec = spec = load_model_spec(model_dir)
        index = check_weights(model_dir, spec)
        report: Any = lambda *_: None  # noqa: E731
        told = check_draft(config, spec)
        self.model = load_weights(index, spec, Ranks(), torch.float32, "cpu", 1, report, told)
        self.rows, size = config.running_max_req_size or 0, config.page_size
        width = pages_per_row(spec, config) - (-2 * config.mtp_step // size)
        self.table = RowTable(self.rows, width, size, spec.vocab_size, "cpu", num_pages)
        layers = num_kv_layers(spec, config)
        self.kv = torch.zeros(num_pages + 1, layers, size, spec.latent_dim)
        self.state = RowState(
            last_token=self.table.last_token,
            lengths=self.table.lengths,
            num_outputs=torch.zeros(self.rows + 1, dtype=torch.int64),
            drafts=torch.zeros(self.rows + 1, max(1, config.mtp_step), dtype=torch.int64),
            capacity=torch.zeros(self.rows + 1, dtype=torch.int64),
            page_table=self.table.page_table,
            page_size=size,
            scratch_slot=num_pages * size,
        )
        self.layer = None
        if self.model.nextn is not None:
            own = layers - spec.num_layers
            chained = config.mtp_mode == "vanilla_with_att"
            self.layer = DraftLayer(
                self.model.nextn, spec, Ranks(), spec.num_layers, own, is_chained=chained
            )
        self.num_accepted = 0

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """One step."""
        table, state, k = self.table, self.state, plan.num_drafts
        table.apply(plan)
        for admit in plan.admitted:
            state.num_outputs[admit.row] = admit.num_output_tokens
        pages = torch.tensor([*table.num_pages, 1])
        state.capacity.copy_(pages * table.page_size)
        inputs, known = self._chunks(plan)
        chunk_inputs = inputs
        firsts = torch.tensor([c.row for c in plan.prefill if c.sample], dtype=torch.int64)
        decode = torch.tensor(plan.decode, dtype=torch.int64)
        places = _join(verify_places(state, firsts, 0), verify_places(state, decode, k))
        if plan.decode:
            verify = verify_inputs(state, decode, k)
            inputs = verify if chunk_inputs is None else join_inputs(chunk_inputs, verify)
        assert inputs is not None
        hidden = hidden_states(self.model, inputs, self.kv, self.spec, Ranks())[0]
        ids = self._sample(hidden[inputs.sampling_index], places)
        first_ids, sampled = ids[: len(firsts)], ids[len(firsts) :].view(len(decode), k + 1)
        for chunk in plan.prefill:
            table.advance([chunk.row], [len(chunk.token_ids)])
        state.last_token[firsts] = first_ids
        state.num_outputs[firsts] += 1
        counts = settle(state, decode, sampled)
        new = torch.cat((first_ids, kept(sampled, counts).flatten()))
        table.rules.penalties.record(places.owners.tolist(), places.owners, new)
        if self.layer is not None and (k or chunk_inputs is not None):
            if not k:  # for the chunks' KV
                assert chunk_inputs is not None
                inputs, hidden = chunk_inputs, hidden[: len(known)]
            last = inputs.sampling_index[: len(firsts)]
            known[last] = first_ids
            starts = torch.arange(len(decode)) * (k + 1) + len(known)
            everyone = torch.cat((firsts, decode)) if k else firsts[:0]
            last = torch.cat((last, starts + counts - 1)) if k else last[:0]
            flat = torch.cat((known, sampled.flatten())) if k else known
            draft(state, self.layer, inputs, hidden, self.kv, flat, everyone, last, k)
        rows = [RowResult([token]) for token in first_ids.tolist()]
        for tokens, count in zip(sampled.tolist(), counts.tolist(), strict=True):
            rows.append(RowResult(tokens[:count]))
            self.num_accepted += count - 1
        for row, result in zip(plan.decode, rows[len(firsts) :], strict=True):
            table.num_outputs[row] += len(result.token_ids)
        for row in firsts.tolist():
            table.num_outputs[row] += 1
        return StepResult(plan.epoch, plan.step, rows)

    def _chunks(self, plan: StepPlan) -> tuple[Any, Tensor]:
        """Inputs of the plan's chunks, None without any; the known token after each of theirs."""
        if not plan.prefill:
            return None, torch.empty(0, dtype=torch.int64)
        chunks = StepPlan(plan.epoch, plan.step, [], [], [], plan.prefill, [])
        inputs = build_inputs(chunks, self.table)
        known = torch.empty_like(inputs.token_ids)
        for chunk, span in zip(plan.prefill, inputs.chunk_spans, strict=True):
            known[span] = torch.tensor([*chunk.token_ids[1:], max(0, chunk.next_id)])
        return inputs, known

    def _sample(self, hidden: Tensor, places: Places) -> Tensor:
        if not len(hidden):
            return places.owners
        logits = compute_logits(self.model, hidden, self.spec, Ranks())
        assert logits is not None
        rows = places.owners.tolist()
        return sample(logits, rows, self.table, self.spec.num_token_ids, None, *places).ids


def _join(first: Places, others: Places) -> Places:
    none = torch.full((len(first.owners), others.drafts.shape[1]), -1)
    return Places(
        torch.cat((first.owners, others.owners)),
        torch.cat((first.positions, others.positions)),
        torch.cat((none, others.drafts)),
    )
