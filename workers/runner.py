"""Runs plans on one rank: apply row changes, build inputs, forward, sample, answer.

Knows nothing of sockets (`loop.py`) nor of formulas (`model/`, `sampler.py`). All ranks run every
plan; rank 0's tokens are everybody's.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.attention.flashinfer_mla import flashinfer_decode
from ..shared.config import ServeConfig
from ..shared.messages import PrefillChunk, StepPlan, StepResult, TokenLogprob
from ..shared.model_spec import ModelSpec
from .drafting import DraftSteps
from .graphs import DecodeGraphs
from .inputs import StepInputs, build_inputs
from .layer_graphs import LayerGraphs
from .memory.device import is_out_of_memory
from .memory.kv_cache import allocate_kv, pages_per_row
from .model.glm4_moe_lite import ModelWeights, compute_logits, hidden_states
from .mtp import Places
from .parallel import Ranks
from .pending import PendingStep
from .rows import RowTable
from .sampling.grammars import GrammarRows
from .sampling.prompt_logprobs import prompt_logprobs
from .sampling.sampler import Masks, sample

_log = logging.getLogger(__name__)


class ModelRunner:
    """One rank. It can run plans once its KV pages are allocated: `num_pages` are the scheduler's,
    one more is scratch.

    `launch` starts a step and `finish` reads its result. On CUDA the host may launch the next
    plan before it finishes the last: nothing in a step needs the sampled tokens on the host,
    except for grammars.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: ServeConfig,
        model: ModelWeights,
        ranks: Ranks,
        epoch: int = 0,
    ) -> None:
        self.epoch = epoch
        self.spec = spec
        self.model = model
        self.ranks = ranks
        self.graphs: DecodeGraphs | None = None
        self.layer_graphs: LayerGraphs | None = None
        self._pending: list[PendingStep] = []  # not read yet, oldest first
        self._ran_out = False  # of memory, in the step before
        self.grammars = GrammarRows(spec.vocab_size) if ranks.rank == 0 else None  # it samples
        # Positions of drafts may lie behind a row's pages.
        extra_pages = -(-2 * config.mtp_step // config.page_size)
        self.table = RowTable(
            config.running_max_req_size or 1,
            pages_per_row(spec, config) + extra_pages,
            config.page_size,
            spec.vocab_size,
            config.device,
        )
        self._config = config
        self.num_rows, self.page_size = self.table.scratch_row, config.page_size
        self.drafting: DraftSteps | None = None
        if config.mtp_mode is not None:
            self.drafting = DraftSteps(model, spec, config, ranks, self.table, self.grammars)
        self._backends = config.llm_prefill_att_backend[0], config.llm_decode_att_backend[0]
        heads = model.layers[0].attention.kv_b.shape[0]
        self.planned = flashinfer_decode(
            self._backends[1] if self.drafting is None else "auto",  # drafts have several queries
            self.table.page_table,
            config.page_size,
            model.embedding.new_empty(0, heads, spec.latent_dim),
            spec.kv_lora_rank,
            spec.softmax_scale,
        )
        self.allocate_pages(1)

    def allocate_pages(self, num_pages: int) -> None:
        """Make the KV pages, in place of those there were."""
        self.num_pages = num_pages
        self.kv = torch.empty(0)  # the old ones go first
        self.kv = allocate_kv(num_pages + 1, self.spec, self._config, self.model.embedding.dtype)
        self.table.page_table[self.table.scratch_row] = num_pages

    def run(self, plan: StepPlan) -> StepResult:
        """Run one step to its end. Any exception means that this rank's state is no longer that
        of the others: it must not run another plan."""
        return self.finish(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start one step: row changes, forward pass, sampling. Exceptions as in `run`. A step for
        which memory does not suffice has an error instead, and so may the next one; the scheduler
        then frees all rows that they had, and forgets what their pages hold."""
        self._check_pages(plan)
        if self.grammars is not None:
            for row in plan.freed:
                self.grammars.free(row)
            for admit in plan.admitted:
                self.grammars.admit(admit)
        step = PendingStep(plan, [])
        ran_out = False
        try:
            self.table.apply(plan)
            self._compute(plan, step)
            step.start_copy(self.table.device)
        except RuntimeError as error:
            if self.ranks.size > 1 or not is_out_of_memory(error):  # the others wait for this one
                raise
            ran_out = True
            step.error = f"the GPU ran out of memory: {str(error).splitlines()[0]}"
        except ValueError:
            if not self._ran_out:
                raise
            step.error = "the step before failed"  # this plan was made without knowing
        self._ran_out = ran_out
        if step.error:
            _log.error("step %d: %s", plan.step, step.error)
            if self.table.device.type == "cuda":
                torch.cuda.empty_cache()  # what the frames of the traceback held is free by now
        self._pending.append(step)
        return step

    def _compute(self, plan: StepPlan, step: PendingStep) -> None:
        if self.drafting is not None and (plan.prefill or plan.decode):
            self._run_with_drafts(plan, step)
        elif plan.prefill or plan.decode:
            logits, step.rows, step.prompt_logprobs = self._forward(plan)
            if step.rows:
                self.table.record(step.rows, self._sample(logits, step))

    def finish(self, step: PendingStep) -> StepResult:
        """Wait for a launched step. Raises FloatingPointError naming a row whose logits are not
        finite numbers."""
        self._read(step)
        plan = step.plan
        if step.error:
            return StepResult(plan.epoch, plan.step, [], error=step.error)
        return StepResult(plan.epoch, plan.step, step.results, step.prompt_logprobs)

    def _check_pages(self, plan: StepPlan) -> None:
        parts = [(a.row, a.pages) for a in plan.admitted]
        parts += [(a.row, a.pages) for a in plan.appended]
        for row, pages in parts:
            if pages and not (min(pages) >= 0 and max(pages) < self.num_pages):
                raise ValueError(f"row {row}: pages {pages} of {self.num_pages}")

    def _forward(
        self, plan: StepPlan
    ) -> tuple[Tensor | None, Sequence[int], list[list[TokenLogprob]]]:
        """-> logits of the rows that sample (None: not on this rank), these rows, and
        log-probabilities of the plan's chunks."""
        table = self.table
        if not plan.prefill and self.graphs is not None and self.graphs.covers(len(plan.decode)):
            for row in plan.decode:
                table.check_room(row, 1)
            self.plan_attention(self.graphs.filled_up(plan.decode))
            decoded = self.graphs.replay(plan.decode)
            table.count(plan.decode, [1] * len(plan.decode))
            return decoded if self.ranks.rank == 0 else None, plan.decode, []
        inputs = build_inputs(plan, table, self._backends)
        if self.planned is not None and plan.decode:
            self.plan_attention(plan.decode)
            inputs.groups[-1] = replace(inputs.groups[-1], planned=self.planned)
        hidden, _ = self._hidden_states(inputs)
        pairs = zip(plan.prefill, inputs.chunk_spans, strict=True)
        found = [self._prompt_logprobs(chunk, hidden[span]) for chunk, span in pairs]
        rows = [chunk.row for chunk in plan.prefill] + plan.decode
        counts = [len(chunk.token_ids) for chunk in plan.prefill] + [1] * len(plan.decode)
        table.advance(rows, counts)
        sampling = inputs.sampling_rows
        if not sampling:
            return None, sampling, found
        logits = compute_logits(self.model, hidden[inputs.sampling_index])
        return logits, sampling, found

    def _hidden_states(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        graphs = self.layer_graphs
        if graphs is not None and graphs.covers(len(inputs.token_ids)):
            return graphs.run(inputs, self.kv, self.num_pages * self.page_size)
        return hidden_states(self.model, inputs, self.kv)

    def plan_attention(self, rows: Sequence[int]) -> None:
        """Before a step that decodes these rows: what runs attention may want to know lengths."""
        if self.planned is not None and rows:
            counts = self.table.num_tokens
            lengths = [counts[row] + 1 if row < len(counts) else 1 for row in rows]
            self.planned.plan(rows, lengths, self.model.embedding.dtype)

    def _sample(
        self,
        logits: Tensor | None,
        step: PendingStep,
        masks: Masks | None = None,
        places: Places | None = None,
    ) -> Tensor:
        """-> ids [len(step.rows)] int64 on every rank."""
        rows = step.rows
        if logits is None:
            ids = torch.empty(len(rows), dtype=torch.int64, device=self.table.device)
        else:
            masks = self._masks(rows) if places is None else masks
            where = places or (None, None, None)
            step.sampled = sample(logits, rows, self.table, self.spec.num_token_ids, masks, *where)
            ids = step.sampled.ids
        return self.ranks.broadcast(ids)

    def _run_with_drafts(self, plan: StepPlan, step: PendingStep) -> None:
        assert self.drafting is not None

        def forward(inputs: StepInputs) -> tuple[Tensor, Tensor]:
            states = self._hidden_states(inputs)
            pairs = zip(plan.prefill, inputs.chunk_spans, strict=True)
            step.prompt_logprobs = [self._prompt_logprobs(c, states[0][span]) for c, span in pairs]
            return states

        def choose(
            logits: Tensor | None, rows: Sequence[int], masks: Masks | None, places: Places
        ) -> Tensor:
            step.rows = rows
            return self._sample(logits, step, masks, places)

        state = self.drafting.state(self.num_pages)
        step.drafted = self.drafting.run(
            plan, state, self.kv, forward, choose, self._read_pending, self.graphs
        )

    def _masks(self, rows: Sequence[int]) -> Masks | None:
        """Grammar masks, which need the tokens of the steps before on the host."""
        if self.grammars is None:
            return None
        if not self.grammars.rows.isdisjoint(rows):
            self._read_pending()
        return self.grammars.masks(rows)

    def _read_pending(self) -> None:
        if self._pending:
            self._read(self._pending[-1])

    def _read(self, step: PendingStep) -> None:
        """Wait for a step's tokens and tell the grammars; once, in the order of steps."""
        while step in self._pending:
            oldest = self._pending.pop(0)
            pairs = oldest.read()
            if self.grammars is not None and pairs:
                self.grammars.advance(*zip(*pairs, strict=True))

    def _prompt_logprobs(self, chunk: PrefillChunk, hidden: Tensor) -> list[TokenLogprob]:
        def logits_of(states: Tensor) -> Tensor | None:
            return compute_logits(self.model, states)

        return prompt_logprobs(self.table, chunk, hidden, logits_of)
