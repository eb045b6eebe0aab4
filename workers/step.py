"""Runs plans on one rank: row changes, forward pass, sampling, accepting drafts, the answer.

Knows nothing of sockets (`loop.py`) nor of formulas (`model/`, `sampling/`). All ranks run every
plan; rank 0 samples for all. A step without drafts is one with 0 drafts.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.sampling.speculative import kept
from ..shared.config import ServeConfig
from ..shared.messages import (
    PagesAppended,
    RowAdmit,
    RowResult,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from .forward import Forward, Forwarded
from .memory.device import HostCopy, is_out_of_memory
from .memory.kv_cache import pages_per_row
from .model.glm4_moe_lite import ModelWeights, compute_logits
from .rows import RowTable
from .sampling.grammars import GrammarRows
from .sampling.logprobs import prompt_logprobs
from .sampling.sampler import Masks, Sampled, sample

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class PendingStep:
    """A step between its launch and the reading of its result. On CUDA it may still be running."""

    plan: StepPlan
    prompt_logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    sampled: Sampled | None = None  # on rank 0
    num_tokens: Tensor | None = None  # with drafts: new tokens of each decode row [n] int64
    copy: HostCopy | None = None  # of what was sampled; None: the step failed
    drafts: HostCopy | None = None  # with grammars: those that it verifies [rows, max_drafts]
    # Rows whose grammar failed: how many of their tokens are right, and why there are no more.
    grammar_errors: dict[int, tuple[int, str]] = field(default_factory=dict)
    results: list[RowResult] = field(default_factory=list)  # once read
    freed: set[int] = field(default_factory=set)  # rows taken from their requests since its launch
    error: str = ""  # it produced nothing

    def __post_init__(self) -> None:
        plan, width = self.plan, self.plan.num_drafts + 1
        self.chunk_rows = [chunk.row for chunk in plan.prefill if chunk.sample]
        # The row of each sampling point: chunks that sample, then the last token and the drafts of
        # each decode row.
        self.rows = self.chunk_rows + [row for row in plan.decode for _ in range(width)]

    @property
    def is_done(self) -> bool:
        """Whether its result can be read without waiting."""
        return self.copy is None or self.copy.is_done

    def start_copy(self, device: torch.device) -> None:
        """Start the copy to the host: on rank 0 sampled tokens and how many of them count;
        elsewhere nothing, it only tells when the step is done."""
        tensors = [] if self.sampled is None else self.sampled.tensors()
        if tensors and self.num_tokens is not None:
            tensors.append(self.num_tokens)
        self.copy = HostCopy(tensors, device)

    def read(self) -> None:
        """Wait for the copy and make `results`. Raises FloatingPointError naming a row whose
        logits are not finite numbers."""
        if self.copy is None:
            return  # it may have failed after it sampled
        host = self.copy.wait()
        if self.sampled is None:
            return  # nothing was sampled, or not here
        counts = [1] * len(self.plan.decode)
        if self.num_tokens is not None:
            counts = host.pop().tolist()
        ids, logprobs = self.sampled.read(host)
        num_chunks, width = len(self.chunk_rows), self.plan.num_drafts + 1
        begins = [*range(num_chunks), *range(num_chunks, len(ids), width)]
        for begin, count in zip(begins, [1] * num_chunks + counts, strict=True):
            span = slice(begin, begin + count)
            entries = list(chain.from_iterable(logprobs[span]))
            self.results.append(RowResult(ids[span], entries))
        if self.grammar_errors:
            self._drop_wrong_results()

    def _drop_wrong_results(self) -> None:
        for index, row in enumerate(self.chunk_rows + self.plan.decode):
            if row in self.grammar_errors:
                num_right, error = self.grammar_errors[row]
                if len(self.results[index].token_ids) > num_right:
                    self.results[index] = RowResult([], error=error)

    def tokens(self) -> Iterator[tuple[int, int]]:
        """(row, token id) of all results, in their order. Without rows that may belong to another
        request by now."""
        rows = self.chunk_rows + self.plan.decode
        for row, result in zip(rows, self.results, strict=True):
            if row not in self.freed:
                for token_id in result.token_ids:
                    yield row, token_id


class ModelRunner:
    """One rank. It can run plans once its KV pages are allocated.

    `launch` starts a step and `finish` reads its result. On CUDA the host may launch the next
    plan before it finishes the last: nothing in a step needs the sampled tokens on the host,
    except for grammars.
    """

    def __init__(self, config: ServeConfig, model: ModelWeights, epoch: int = 0) -> None:
        self.epoch = epoch
        self.spec, self.ranks = model.spec, model.ranks
        self.page_size = config.page_size
        self.table = RowTable(
            config.running_max_req_size or 1,
            pages_per_row(model.spec, config),
            config.page_size,
            model.spec.vocab_size,
            config.device,
            config.mtp_step if config.mtp_mode is not None else 0,
        )
        self.num_rows = self.table.scratch_row
        self.forward = Forward(model, config, self.table)
        self.grammars: GrammarRows | None = None
        if self.ranks.rank == 0:  # it samples
            self.grammars = GrammarRows(Path(config.model_dir), model.spec.vocab_size)
        self._logits_of = partial(compute_logits, model)
        self._pending: list[PendingStep] = []  # not read yet, oldest first
        self._ran_out = False  # of memory, in the step before

    @property
    def num_pages(self) -> int:
        """KV pages for the scheduler."""
        return self.forward.num_pages

    def run(self, plan: StepPlan) -> StepResult:
        """Run one step to its end. Any exception means that this rank's state is no longer that
        of the others: it must not run another plan."""
        return self.finish(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start one step: row changes, forward pass, sampling. Exceptions as in `run`. A step for
        which memory does not suffice has an error instead, and so may the next one; the scheduler
        then frees all rows that they had, and forgets the contents of their pages."""
        self._check_pages(plan)
        for pending in self._pending:
            pending.freed.update(plan.freed)
        if self.grammars is not None:
            for row in plan.freed:
                self.grammars.free(row)
            for admit in plan.admitted:
                self.grammars.admit(admit)
        step = PendingStep(plan)
        try:
            self.table.apply(plan)
            if plan.prefill or plan.decode:
                self._compute(step)
            step.start_copy(self.table.device)
            self._ran_out = False
        except (RuntimeError, ValueError) as error:
            step.error = self._explain(error)
            logger.error("step %d: %s", plan.step, step.error)
        if step.error and self.table.device.type == "cuda":
            torch.cuda.empty_cache()  # the frames of the traceback hold no tensors any more
        self._pending.append(step)
        return step

    def _explain(self, error: RuntimeError | ValueError) -> str:
        """Why a step has no result. Raises the error again if it is none of memory, nor follows
        one."""
        ran_out, self._ran_out = self._ran_out, False
        if isinstance(error, ValueError):
            if not ran_out:
                raise error
            return "the step before failed"  # this plan was made without knowing
        if self.ranks.size > 1 or not is_out_of_memory(error):  # the others wait for this one
            raise error
        self._ran_out = True
        return f"the GPU ran out of memory: {str(error).splitlines()[0]}"

    def finish(self, step: PendingStep) -> StepResult:
        """Wait for a launched step. Raises FloatingPointError naming a row whose logits are not
        finite numbers."""
        self._read(step)
        plan = step.plan
        if step.error:
            return StepResult(plan.epoch, plan.step, [], error=step.error)
        return StepResult(plan.epoch, plan.step, step.results, step.prompt_logprobs)

    def _check_pages(self, plan: StepPlan) -> None:
        num_pages = self.forward.num_pages
        parts: list[RowAdmit | PagesAppended] = [*plan.admitted, *plan.appended]
        for part in parts:
            if part.pages and not (min(part.pages) >= 0 and max(part.pages) < num_pages):
                raise ValueError(f"row {part.row}: pages {part.pages} of {num_pages}")

    def _compute(self, step: PendingStep) -> None:
        plan, rows, table = step.plan, step.rows, self.table
        is_masked = self.grammars is not None and not self.grammars.rows.isdisjoint(rows)
        if is_masked and plan.num_drafts:  # masks are made of them while the forward pass runs
            step.drafts = HostCopy([table.drafts], table.device)
        forwarded = self.forward.before_sampling(plan)
        step.prompt_logprobs = [[] for _ in plan.prefill]
        if not table.rules.prompt_logprobs.keys().isdisjoint(chunk.row for chunk in plan.prefill):
            step.prompt_logprobs = self._prompt_logprobs(plan, forwarded)
        masks = self._masks(step) if is_masked else None
        ids = self._sample(step, forwarded, masks) if rows else forwarded.points.rows
        step.num_tokens = self.forward.after_sampling(plan, forwarded, ids)
        if table.rules.penalties.concerns(rows) or table.rules.thinking.concerns(rows):
            self._record(step, forwarded.points.rows, ids)
        table.count(plan)  # not before: rules of the first outputs look at the host's count

    def _prompt_logprobs(self, plan: StepPlan, forwarded: Forwarded) -> list[list[TokenLogprob]]:
        """For each chunk, empty where not asked for."""
        pairs = zip(plan.prefill, forwarded.chunk_states(), strict=True)
        return [prompt_logprobs(self.table, *pair, self._logits_of) for pair in pairs]

    def _sample(self, step: PendingStep, forwarded: Forwarded, masks: Masks | None) -> Tensor:
        """-> ids [num_points] int64 on every rank."""
        logits, points = forwarded.logits, forwarded.points
        if logits is None:
            return self.ranks.broadcast(torch.empty_like(points.rows))
        num_ids = self.spec.num_token_ids
        step.sampled = sample(logits, step.rows, points, self.table, num_ids, masks)
        return self.ranks.broadcast(step.sampled.ids)

    def _masks(self, step: PendingStep) -> Masks:
        """Grammar masks of all points, which need the tokens of the steps before on the host; those
        after a draft need the drafts too."""
        grammars = self.grammars
        assert grammars is not None, "rank 0 samples"
        if self._pending:
            self._read(self._pending[-1])
        plan, count = step.plan, len(step.chunk_rows)
        if step.drafts is None:
            masked, masks = grammars.masks(step.rows)
        else:
            width = plan.num_drafts + 1
            masked, masks = grammars.masks(step.chunk_rows)
            guesses = step.drafts.wait()[0][:, : plan.num_drafts].tolist()
            following = [row for row in plan.decode if row in grammars.rows]
            ahead = grammars.look_ahead(following, [guesses[row] for row in following])
            masks = torch.cat((masks, ahead))
            for number, row in enumerate(plan.decode):
                if row in grammars.rows:
                    masked += range(count + number * width, count + (number + 1) * width)
        step.grammar_errors = grammars.errors(step.rows)
        return masked, masks

    def _record(self, step: PendingStep, index: Tensor, ids: Tensor) -> None:
        """Tell rules that depend on outputs the tokens ids [num_points] of the rows `index`,
        without drafts not accepted."""
        if step.num_tokens is not None:
            count, width = len(step.chunk_rows), step.plan.num_drafts + 1
            accepted = kept(ids[count:].view(-1, width), step.num_tokens)
            ids = torch.cat((ids[:count], accepted.flatten()))
        rules = self.table.rules
        rules.penalties.record(step.rows, index, ids)
        if rules.thinking.concerns(step.rows):
            rules.thinking.record(index, ids)

    def _read(self, step: PendingStep) -> None:
        """Wait for a step's tokens and tell the grammars; once, in the order of steps."""
        while step in self._pending:
            oldest = self._pending.pop(0)
            oldest.read()
            grammars = self.grammars
            if grammars is not None and grammars.rows and (tokens := list(oldest.tokens())):
                grammars.advance(*zip(*tokens, strict=True))
