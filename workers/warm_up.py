"""Warm-up steps with dummy rows, run before a server is ready: to find damaged weights, to measure
memory, and to compile kernels and size buffers before requests wait for them.

All rows share page 0, so these steps can run before the KV pages are allocated. Every function
frees its rows again.
"""

from collections.abc import Sequence

from ..shared.config import ServeConfig
from ..shared.messages import PrefillChunk, RowAdmit, StepPlan
from ..shared.sampling import SamplingParams
from .step import ModelRunner

_LONG_PREFIX = 1 << 16  # tokens; attention reads longer ones in segments, all alike
# Kernels are compiled anew for numbers that 16 divides and for those that it does not.
_COUNTS = (1, 2, 12, 24, 48, 100, 200, 400, 700, 1024, 1500, 2048, 3000, 4096, 6000, 8192)
_EXTENSIONS = (1, 3, 10, 40, 300, 700, 2000)  # tokens after a prefix
_ROWS = (3, 6, 10, 20, 40, 70, 140, 300)  # decode rows; graphs are of the sizes that 16 divides
_GREEDY = SamplingParams(max_new_tokens=9)
_WAYS_TO_SAMPLE = (
    _GREEDY,
    SamplingParams(max_new_tokens=9, temperature=1.0),
    SamplingParams(max_new_tokens=9, temperature=1.0, top_p=0.9, top_k=40, min_p=0.01),
    SamplingParams(max_new_tokens=9, temperature=1.0, frequency_penalty=1.0, num_logprobs=5),
    SamplingParams(max_new_tokens=9, logit_bias=((0, 1.0),), stop_token_ids=(1,), min_new_tokens=1),
)


def warm_up(runner: ModelRunner) -> None:
    """A prompt of one token and a decode step. Raises FloatingPointError if the weights make no
    finite numbers."""
    _run(runner, [(0, 1)])


def run_largest_step(runner: ModelRunner, config: ServeConfig) -> None:
    """The step that needs most memory: as many prompt tokens as a step may have, one chunk of them
    after a long prefix."""
    longest = config.max_req_total_len or 1
    budget = config.batch_max_tokens or longest
    chunk = min(config.chunked_prefill_size or budget, budget, longest)
    counts = [min(chunk, budget - begin) for begin in range(0, budget, chunk)]
    prefixes = [min(longest - chunk, _LONG_PREFIX)] + [0] * (len(counts) - 1)
    _run(runner, list(zip(prefixes, counts, strict=True)), num_drafts=config.mtp_step)


def run_usual_steps(runner: ModelRunner, config: ServeConfig) -> None:
    """The kinds of steps that a server meets: few and many prompt tokens, several prompts, chunks
    after prefixes, with and without decode rows, every way to sample."""
    budget = config.batch_max_tokens or 1
    longest = config.max_req_total_len or budget
    most = min(budget, config.chunked_prefill_size or budget, longest - 1)
    counts = [near for count in _COUNTS for near in (count - count % 16, count + count % 16 + 3)]
    kinds = [[(0, count)] for count in counts if 0 < count < most]
    kinds += [[(0, 1)] * rows for rows in _ROWS if rows < min(most, runner.num_rows)]
    kinds += [[(0, 1 + most // 9), (0, 1 + most // 7)], [(0, most)]]
    kinds += [[(64, count)] for count in _EXTENSIONS if 64 + count < most]
    kinds += [[(64, count), (0, 2), (128, 1)] for count in _EXTENSIONS if 128 + count < most]
    for kind in kinds:
        _run(runner, kind, num_drafts=config.mtp_step)
    for sampling in _WAYS_TO_SAMPLE:
        for rows in (1, 4):
            _run(runner, [(0, 2)] * rows, sampling, config.mtp_step)


def _run(
    runner: ModelRunner,
    spans: Sequence[tuple[int, int]],
    sampling: SamplingParams = _GREEDY,
    num_drafts: int = 0,
) -> None:
    """A step with a chunk for each (prefix, count), one that decodes these rows, and one that does
    both."""
    spans = spans[: max(1, runner.num_rows - 1)]
    page_size, epoch = runner.page_size, runner.epoch
    admits, chunks = [], []
    counted = [0] if sampling.uses_penalties else []
    for row, (begin, count) in enumerate(spans):
        pages = [0] * (-(-(begin + count) // page_size) + 1)
        admits.append(RowAdmit(row, sampling, pages, begin, 0, counted))
        chunks.append(PrefillChunk(row, begin, [0] * count, sample=True))
    rows, last = list(range(len(spans))), len(spans)
    plans = [
        StepPlan(epoch, 0, [], admits, [], chunks, [], num_drafts),
        StepPlan(epoch, 0, [], [], [], [], rows, num_drafts),
        StepPlan(epoch, 0, rows, [], [], [], []),
    ]
    if last < runner.num_rows:
        extra = RowAdmit(last, sampling, [0], 0, 0, counted)
        one = PrefillChunk(last, 0, [0], sample=True)
        plans[2:] = [
            StepPlan(epoch, 0, [], [extra], [], [one], rows, num_drafts),
            StepPlan(epoch, 0, [*rows, last], [], [], [], []),
        ]
    for plan in plans:
        runner.run(plan)
