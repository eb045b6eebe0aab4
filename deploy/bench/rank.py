"""Runs one rank in this process for `latency.py`: makes plans as the scheduler does, and launches
each plan before the tokens of the last one are read."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean

from rich.console import Console
from torch import Tensor

from ...shared.config import ServeConfig
from ...shared.errors import UsageError
from ...shared.messages import Grammar, PrefillChunk, RowAdmit, StepPlan, StepResult
from ...shared.model_spec import ModelSpec
from ...shared.sampling import SamplingParams

_COUNTED_STEPS = 8  # whose experts are counted
# Texts of which no end comes within a benchmark, one for each kind of value.
_SCHEMAS: tuple[dict[str, object], ...] = (
    {"type": "string", "minLength": 100_000, "maxLength": 200_000},
    {"type": "array", "minItems": 10_000, "items": {"type": "integer"}},
    {
        "type": "array",
        "minItems": 10_000,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "day": {"type": "string", "format": "date"},
                "unit": {"enum": ["celsius", "fahrenheit", "kelvin"]},
            },
            "required": ["name", "day", "unit"],
            "additionalProperties": False,
        },
    },
)


@dataclass(frozen=True)
class Steps:
    """Seconds between the tokens of successive steps (one entry less than there are steps), and the
    mean number of tokens that a decode row gets in a step."""

    seconds: list[float]
    tokens_per_row: float


@dataclass(frozen=True)
class Experts:
    """Distinct experts that a layer reads in a decode step: the mean over the main model's MoE
    layers, and the number for each pass of the draft layer. Both are means over steps."""

    main: float = 0.0
    drafts: list[float] = field(default_factory=list)


class Routing:
    """Records which experts are chosen, because weights that send all tokens to the same few
    experts make any engine look fast. Nothing is recorded outside of `recorded`."""

    def __init__(self) -> None:
        self._seen: list[Tensor] | None = None

    def __call__(self, ids: Tensor) -> None:
        """The expert ids [num_tokens, k] of one routing; see `MoeWeights.on_route`."""
        if self._seen is not None:
            self._seen.append(ids.clone())

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """The expert ids of each routing inside the `with`, on the device, in the order of layers
        and passes."""
        self._seen = []
        try:
            yield self._seen
        finally:
            self._seen = None


class Bench:
    """A rank and the plans that it runs. They use rows 0 to n-1, and pages in ascending order.
    In each step a decode row verifies `num_drafts` drafts and makes as many. The outputs of the
    first `num_constrained` rows must match a JSON schema.

    A row may decode `steps` steps until it is freed. Prompts are cut from `text`, or consist of
    random ids if it is empty.
    """

    def __init__(
        self,
        config: ServeConfig,
        spec: ModelSpec,
        runtime_dir: Path,
        steps: int,
        text: Sequence[int] = (),
    ) -> None:
        from ...workers.startup import load_runner

        self._console = Console(stderr=True)
        self._routing = Routing()
        self.runner = load_runner(config, 0, 0, runtime_dir, self._report, self._routing)
        self.config = config
        self.is_chained = config.mtp_mode == "vanilla_with_att"
        self.num_drafts = 0
        self.num_constrained = 0
        self._eos_ids = spec.eos_token_ids
        self._num_moe_layers = spec.num_layers - spec.first_dense_layers
        self._vocab = spec.num_token_ids if spec.num_token_ids < 1 << 61 else spec.vocab_size
        self._steps = steps + _COUNTED_STEPS + 1
        self._text = text

    def prefill(self, rows: int, tokens: int) -> float:
        """Fill `rows` rows with prompts of `tokens` tokens, as many per step as the budget allows.
        Returns the seconds until all rows have their first token. Raises UsageError if the rows do
        not fit."""
        budget = self.config.batch_max_tokens or tokens
        chunk = min(self.config.chunked_prefill_size or budget, budget)
        pages = self._pages_per_row(tokens)
        self._check_room(rows, rows * pages, pages)
        ids = self._prompts(rows, tokens, rows + tokens)
        params = SamplingParams(max_new_tokens=1 << 20, stop_token_ids=self._eos_ids)
        plans = []
        done = [0] * rows
        while min(done) < tokens:
            admits, chunks, left = [], [], budget
            for row in range(rows):
                begin = done[row]
                end = done[row] = min(tokens, begin + min(chunk, left))
                left -= end - begin
                if begin == 0 < end:
                    row_pages = list(range(row * pages, (row + 1) * pages))
                    grammar = schema_grammar(row) if row < self.num_constrained else None
                    admits.append(RowAdmit(row, params, row_pages, 0, 0, [], grammar))
                if begin < end:
                    following = -1 if end == tokens else ids[row][end]
                    known = ids[row][begin:end]
                    chunks.append(PrefillChunk(row, begin, known, end == tokens, following))
            plans.append(self._plan(admits, chunks))
        started = time.perf_counter()
        self._run(plans)
        return time.perf_counter() - started

    def decode(self, rows: int, steps: int) -> Steps:
        """Decode all rows until `steps` steps are timed."""
        return self._run([self._plan(decode=list(range(rows))) for _ in range(steps + 1)])

    def mixed(self, rows: int, context: int, tokens: int, steps: int) -> Steps:
        """Steps that decode all rows, which have `context` tokens at first, together with a new
        prompt of `tokens` tokens in each step. Raises UsageError as `prefill` does."""
        first = rows * self._pages_per_row(context)
        pages = list(range(first, first - (-tokens // self.config.page_size)))
        self._check_room(rows + 1, first + len(pages), len(pages))
        plans = []
        for step in range(steps + 1):
            [ids] = self._prompts(1, tokens, step)
            admit = RowAdmit(rows, SamplingParams(max_new_tokens=1), pages, 0, 0, [])
            chunk = PrefillChunk(rows, 0, ids, sample=True)
            freed = [rows] if step else []
            plans.append(self._plan([admit], [chunk], list(range(rows)), freed))
        return self._run(plans)

    def count_experts(self, rows: int) -> Experts:
        """Decode all rows for some steps and count the experts of their routing."""
        # The routing inside graphs cannot be observed.
        with self.runner.forward.without_graphs(), self._routing.recorded() as seen:
            self.decode(rows, _COUNTED_STEPS - 1)
        return average_experts(
            count_distinct(seen), self._num_moe_layers, self.num_drafts, _COUNTED_STEPS
        )

    def free(self, rows: int) -> None:
        """Free all rows."""
        self.runner.run(self._plan(freed=list(range(rows))))

    def _pages_per_row(self, tokens: int) -> int:
        longest = tokens + self._steps * (self.num_drafts + 1)
        return -(-longest // self.config.page_size)

    def _check_room(self, rows: int, pages: int, longest: int) -> None:
        """Raise UsageError unless `rows` rows with `pages` pages in total fit, of which one row has
        `longest`."""
        size, limit = self.config.page_size, self.config.max_req_total_len
        if limit is not None and longest > -(-limit // size) + 1:  # as `_pages_per_row` rounds it
            raise UsageError(
                f"a row would grow to {longest * size} tokens, --max_req_total_len is {limit}: "
                "use fewer --steps or shorter rows"
            )
        if pages > self.runner.num_pages or rows > self.runner.num_rows:
            raise UsageError(
                f"{rows} rows with {pages * size:,} KV tokens do not fit: there are "
                f"{self.runner.num_rows} rows and {self.runner.num_pages * size:,} KV tokens"
            )

    def _prompts(self, rows: int, tokens: int, seed: int) -> list[list[int]]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        if not self._text:
            return torch.randint(0, self._vocab, (rows, tokens), generator=generator).tolist()
        text = [*self._text] * (1 + tokens // len(self._text))
        last = len(text) - tokens + 1
        begins = torch.randint(0, last, (rows,), generator=generator).tolist()
        return [text[begin : begin + tokens] for begin in begins]

    def _plan(
        self,
        admits: Sequence[RowAdmit] = (),
        chunks: Sequence[PrefillChunk] = (),
        decode: Sequence[int] = (),
        freed: Sequence[int] = (),
    ) -> StepPlan:
        drafts = self.num_drafts
        return StepPlan(0, 0, list(freed), list(admits), [], list(chunks), list(decode), drafts)

    def _run(self, plans: Sequence[StepPlan]) -> Steps:
        """Launch each plan before the result of the last one is read, as a worker does."""
        times, results = [], []
        ahead = None
        for plan in plans:
            step = self.runner.launch(plan)
            if ahead is not None:
                results.append(self.runner.finish(ahead))
                times.append(time.perf_counter())
            ahead = step
        if ahead is not None:
            results.append(self.runner.finish(ahead))
            times.append(time.perf_counter())
        counts = [n for pair in zip(plans, results, strict=True) for n in decoded(*pair)]
        return Steps([b - a for a, b in pairwise(times)], mean(counts) if counts else 0.0)

    def _report(self, stage: str, done: int, total: int) -> None:
        if not done or done == total:
            self._console.print(f"{time.monotonic():.1f} {stage} {done}/{total}", style="dim")


def schema_grammar(row: int) -> Grammar:
    """A JSON schema for this row; neighbours have different ones."""
    from llguidance import LLMatcher

    schema = _SCHEMAS[row % len(_SCHEMAS)]
    return Grammar(LLMatcher.grammar_from_json_schema(schema, {"whitespace_flexible": False}))


def decoded(plan: StepPlan, result: StepResult) -> list[int]:
    """Number of tokens that each decode row of a plan got. Raises RuntimeError if it failed."""
    for error in (result.error, *(row.error for row in result.rows)):
        if error:
            raise RuntimeError(error)
    num_chunks = len(result.rows) - len(plan.decode)  # results of chunks come first
    return [len(row.token_ids) for row in result.rows[num_chunks:]]


def count_distinct(seen: Sequence[Tensor]) -> list[int]:
    """Distinct experts in each of the recorded routings. Waits for the device."""
    return [len(set(ids.flatten().tolist())) for ids in seen]


def average_experts(counts: Sequence[int], layers: int, passes: int, steps: int) -> Experts:
    """`counts` has an entry for every routing of `steps` steps in order: in each step first the
    `layers` MoE layers of the main model, then the `passes` of the draft layer."""
    width = layers + passes
    assert len(counts) == width * steps, f"{len(counts)} routings in {steps} steps of {width}"
    main = [n for i, n in enumerate(counts) if i % width < layers]
    drafts = [mean(counts[layers + index :: width]) for index in range(passes)]
    return Experts(mean(main) if main else 0.0, drafts)
