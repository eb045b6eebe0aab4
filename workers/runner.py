"""Runs plans on one rank: apply row changes, build inputs, forward, sample, answer.

Knows nothing of sockets (`loop.py`) nor of formulas (`model/`, `sampler.py`). All ranks run every
plan; rank 0's tokens are everybody's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..shared.config import ServeConfig
from ..shared.errors import ConfigError, ModelError
from ..shared.messages import (
    PrefillChunk,
    RowAdmit,
    RowResult,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from ..shared.model_spec import ModelSpec, load_model_spec
from ..shared.sampling import SamplingParams
from .checkpoint import check_weights
from .device import HostCopy
from .grammars import GrammarRows
from .graphs import DecodeGraphs
from .host import usable_cores
from .inputs import build_inputs
from .kv_cache import allocate_kv, count_pages, pages_per_row
from .model.glm4_moe_lite import ModelWeights, compute_logits, forward
from .parallel import Ranks, check_split, join_ranks
from .rows import RowTable
from .sampler import sample, token_logprobs
from .weights import load_weights, random_weights

_DTYPES = {
    **dict.fromkeys(("float32", "fp32"), torch.float32),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "fp16"), torch.float16),
}
# A barrier between threads costs more than the ops of a tiny model, and far more when the cores
# are shared: at hidden 128 on 2 busy cores 2 threads gave 8 tokens/s, 1 thread 131. The limit
# itself is a guess between that and real models.
_SINGLE_THREAD_HIDDEN = 512
_LOGPROB_SEGMENT = 256  # prompt tokens whose logits exist at one time

ReportProgress = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass
class PendingStep:
    """A step that was launched. On CUDA it may still be running."""

    plan: StepPlan
    prompt_logprobs: list[list[TokenLogprob]]
    rows: Sequence[int] = ()  # that sampled
    copy: HostCopy | None = None  # of what they sampled; None: nothing, or not rank 0
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    token_ids: list[int] | None = None  # once read

    @property
    def is_done(self) -> bool:
        """Whether its result can be read without waiting."""
        return self.copy is None or self.copy.is_done


class ModelRunner:
    """One rank, ready to run plans. `num_pages` KV pages are the scheduler's; one more is scratch.

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
        self._spec = spec
        self._model = model
        self._ranks = ranks
        self._graphs: DecodeGraphs | None = None
        self._pending: list[PendingStep] = []  # not read yet, oldest first
        self.grammars = GrammarRows(spec.vocab_size) if ranks.rank == 0 else None  # it samples
        self._table = RowTable(
            config.running_max_req_size or 1,
            pages_per_row(spec, config),
            config.page_size,
            spec.vocab_size,
            config.device,
        )
        self.num_pages = count_pages(spec, config, model.embedding.dtype)
        self._kv = allocate_kv(self.num_pages + 1, spec, config, model.embedding.dtype)
        self._table.page_table[self._table.scratch_row] = self.num_pages

    def run(self, plan: StepPlan) -> StepResult:
        """Run one step to its end. Any exception means that this rank's state is no longer that
        of the others: it must not run another plan."""
        return self.finish(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start one step: row changes, forward pass, sampling. Exceptions as in `run`."""
        table = self._table
        self._check_pages(plan)
        table.apply(plan)
        if self.grammars is not None:
            for row in plan.freed:
                self.grammars.free(row)
            for admit in plan.admitted:
                self.grammars.admit(admit)
        step = PendingStep(plan, [])
        if plan.prefill or plan.decode:
            logits, step.rows, step.prompt_logprobs = self._forward(plan)
            if step.rows:
                self._sample(logits, step)
        self._pending.append(step)
        return step

    def finish(self, step: PendingStep) -> StepResult:
        """Wait for a launched step. Raises FloatingPointError naming a row whose logits are not
        finite numbers."""
        self._read(step)
        results = []
        if step.token_ids:
            pairs = zip(step.token_ids, step.logprobs, strict=True)
            results = [RowResult([i], found) for i, found in pairs]
        return StepResult(step.plan.epoch, step.plan.step, results, step.prompt_logprobs)

    def warm_up(self) -> None:
        """Run a prefill and a decode step in row 0 and page 0, then forget them. Start-up costs of
        the libraries are paid here, and weights that make no finite numbers are found."""
        greedy = SamplingParams(max_new_tokens=2)
        admit = RowAdmit(0, greedy, [0], 0, 0, [])
        chunk = PrefillChunk(0, 0, [0], sample=True)
        self.run(StepPlan(self.epoch, 0, [], [admit], [], [chunk], []))
        if self._table.page_size > 1:
            self.run(StepPlan(self.epoch, 0, [], [], [], [], [0]))
        self.run(StepPlan(self.epoch, 0, [0], [], [], [], []))

    @torch.inference_mode()
    def capture_graphs(self, largest: int, report: Callable[[int, int], None]) -> float:
        """Capture decode steps of up to `largest` rows. -> seconds."""
        graphs = DecodeGraphs(self._model, self._table, self._kv, self._spec, self._ranks, largest)
        seconds = graphs.capture(report)
        self._graphs = graphs
        return seconds

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
        table = self._table
        if not plan.prefill and self._graphs is not None and self._graphs.covers(len(plan.decode)):
            for row in plan.decode:
                table.check_room(row, 1)
            logits = self._graphs.replay(plan.decode)
            table.count(plan.decode, [1] * len(plan.decode))
            return logits if self._ranks.rank == 0 else None, plan.decode, []
        inputs = build_inputs(plan, table)
        hidden = forward(self._model, inputs, self._kv, self._spec, self._ranks)
        prompt_logprobs = [
            self._prompt_logprobs(chunk, hidden[span])
            for chunk, span in zip(plan.prefill, inputs.chunk_spans, strict=True)
        ]
        rows = [chunk.row for chunk in plan.prefill] + plan.decode
        counts = [len(chunk.token_ids) for chunk in plan.prefill] + [1] * len(plan.decode)
        table.advance(rows, counts)
        sampling = inputs.sampling_rows
        if not sampling:
            return None, sampling, prompt_logprobs
        logits = compute_logits(self._model, hidden[inputs.sampling_index], self._spec, self._ranks)
        return logits, sampling, prompt_logprobs

    def _sample(self, logits: Tensor | None, step: PendingStep) -> None:
        rows = step.rows
        if logits is None:
            ids = torch.empty(len(rows), dtype=torch.int64, device=self._table.device)
            step.logprobs = [[]] * len(rows)
        else:
            ids, step.logprobs = sample(
                logits, rows, self._table, self._spec.num_token_ids, self._masks(rows)
            )
        self._ranks.broadcast(ids)
        self._table.record(rows, ids)
        step.copy = HostCopy([ids])

    def _masks(self, rows: Sequence[int]) -> tuple[list[int], Tensor] | None:
        """Grammar masks, which need the tokens of the steps before on the host."""
        if self.grammars is None:
            return None
        if not self.grammars.rows.isdisjoint(rows):
            for step in list(self._pending):
                self._read(step)
        return self.grammars.masks(rows)

    def _read(self, step: PendingStep) -> None:
        """Wait for a step's tokens and tell the grammars; once, in the order of steps."""
        while self._pending and step in self._pending:
            oldest = self._pending.pop(0)
            if oldest.copy is not None:
                oldest.token_ids = oldest.copy.wait()[0].tolist()
                if self.grammars is not None:
                    self.grammars.advance(oldest.rows, oldest.token_ids)

    def _prompt_logprobs(self, chunk: PrefillChunk, hidden: Tensor) -> list[TokenLogprob]:
        """About each token of the chunk, given all before it; [] where not asked for. A chunk that
        follows a cached prefix lacks the state before it: its first entry says rank 0."""
        table = self._table
        num_top = table.params[chunk.row].num_prompt_logprobs
        if num_top < 0:
            return []
        before, targets = hidden[:-1], chunk.token_ids[1:]
        found: list[TokenLogprob] = []
        carried = table.last_hidden.pop(chunk.row, None)
        if carried is not None:
            before, targets = torch.cat((carried, before)), chunk.token_ids
        elif chunk.start > 0:
            found.append(TokenLogprob(chunk.token_ids[0], -9999.0, 0, []))
        if not chunk.sample:
            table.last_hidden[chunk.row] = hidden[-1:].clone()
        for begin in range(0, len(targets), _LOGPROB_SEGMENT):
            part = slice(begin, begin + _LOGPROB_SEGMENT)
            logits = compute_logits(self._model, before[part], self._spec, self._ranks)
            if logits is not None:
                ids = torch.tensor(targets[part], device=logits.device)
                found += token_logprobs(logits, ids, [num_top] * len(ids))
        return found


def load_runner(
    config: ServeConfig, rank: int, epoch: int, runtime_dir: Path, report: ReportProgress
) -> ModelRunner:
    """From a settled config to a runner that has run its first step. Raises ConfigError or
    ModelError before any weight is allocated, RuntimeError when other ranks do not show up."""
    model_dir = Path(config.model_dir)
    spec = load_model_spec(model_dir)
    torch.set_num_threads(num_threads(spec, config.tp))
    check_split(spec, config.tp)
    dtype = parse_dtype(config.data_type or spec.dtype)
    index = None
    if config.load_format != "dummy":
        report("checking weights", 0, 0)
        index = check_weights(model_dir, spec)
    report("meeting ranks", 0, 0)
    # The ranks do not load equally fast. How long a step may take is the scheduler's to watch.
    patience = max(config.start_timeout_s, config.step_timeout_s)
    ranks = join_ranks(rank, config.tp, epoch, runtime_dir, patience)
    if index is None:
        report("making random weights", 0, 0)
        model = random_weights(spec, ranks, dtype, config.device)
    else:
        model = load_weights(
            index,
            spec,
            ranks,
            dtype,
            config.device,
            config.load_workers,
            lambda done, total: report("loading weights", done, total),
        )
    runner = ModelRunner(spec, config, model, ranks, epoch)
    report("warming up", 0, 0)
    if config.device == "cuda" and runner.grammars is not None:
        runner.grammars.preload()
    try:
        runner.warm_up()
    except FloatingPointError as error:
        raise ModelError(f"{model_dir}: the weights are damaged: {error}") from error
    return runner


def num_threads(spec: ModelSpec, tp: int) -> int:
    """This rank's share of the cores, never above what OMP_NUM_THREADS says; 1 for small models."""
    if spec.hidden_size < _SINGLE_THREAD_HIDDEN:
        return 1
    return max(1, min(torch.get_num_threads(), usable_cores() // tp))


def parse_dtype(name: str) -> torch.dtype:
    """The torch type of a `data_type` value. Raises ConfigError naming the ones there are."""
    if name not in _DTYPES:
        raise ConfigError(f"--data_type {name!r} is unknown, use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
