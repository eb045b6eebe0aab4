"""The last test before a rank is ready: does this model, on this machine, give the right tokens?

The same prompt runs alone, and in chunks beside other rows. Both must give the same tokens, which
finds kernels, graphs or cards that compute wrong numbers. If the checkpoint has a stored reference
(`glimmer check --write_golden`), the tokens must be its tokens, which finds wrong weights. All
ranks run the same steps; rank 0 compares.

Where the two likeliest tokens are closer than the tolerance, either is right, and the comparison
ends, because what follows differs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from ..shared.config import ServeConfig
from ..shared.errors import ModelError
from ..shared.messages import PrefillChunk, RowAdmit, StepPlan, TokenLogprob
from ..shared.sampling import SamplingParams
from .step import ModelRunner

GOLDEN_FILE = "glimmer_golden.json"
NUM_TOKENS = 12  # of a reference
_FEW_TOKENS = 4  # without one
_NUM_TOP = 5
_NEIGHBOURS = 2
_PATTERN = 8  # tokens; a repeated one, so that most models have a likely next token
_REPEATS = 3
_MAX_GOLDEN_BYTES = 1 << 20


class Tolerance(NamedTuple):
    """Largest differences of log-probabilities: of a chosen token, and the mean of the likeliest
    tokens at all positions, where those behind a change of the token count as 0. A trained model is
    so sure of its tokens that wrong weights show in the alternatives first."""

    token: float
    mean: float


# In 32 bits only the order of sums differs. In 16 bits rounding can also send a token to another
# expert, which changes one position a lot. On the demo model in bfloat16 the mean is 0.03, and 0.4
# without the weights of one expert.
EXACT = Tolerance(0.01, 0.002)
ROUNDED = Tolerance(1.5, 0.25)


class Golden(msgspec.Struct, forbid_unknown_fields=True):
    """A stored reference: a prompt, and the greedy tokens with the likeliest (id, log-probability)
    pairs at each position, the chosen one first."""

    prompt_ids: list[int]
    token_ids: list[int]
    top_logprobs: list[list[tuple[int, float]]]
    data_type: str
    made_with: str = ""

    def entries(self) -> list[TokenLogprob]:
        """As the model reports them."""
        return [TokenLogprob(top[0][0], top[0][1], 1, top) for top in self.top_logprobs]


def read_golden(model_dir: Path, num_token_ids: int) -> Golden | None:
    """The reference of a checkpoint; None if it has none. Raises ModelError naming what is wrong
    with the file."""
    path = model_dir / GOLDEN_FILE
    try:
        if path.stat().st_size > _MAX_GOLDEN_BYTES:
            raise ModelError(f"{path} has more than {_MAX_GOLDEN_BYTES} bytes")
        golden = msgspec.json.decode(path.read_bytes(), type=Golden)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: {error}; write it again: glimmer check --write_golden"
        ) from error
    chosen = [top[0][0] if top else -1 for top in golden.top_logprobs]
    ids = [*golden.prompt_ids, *golden.token_ids]
    if not golden.prompt_ids or not chosen or chosen != golden.token_ids:
        raise ModelError(f"{path}: needs a prompt, and top_logprobs of each of its token_ids")
    if not all(0 <= token_id < num_token_ids for token_id in ids):
        raise ModelError(f"{path}: a token id is not in 0..{num_token_ids - 1}: of another model?")
    return golden


def self_test(runner: ModelRunner, config: ServeConfig) -> None:
    """Raises ModelError saying at which position tokens differ, and what to do. The runner must
    have its KV pages; its rows are free again afterwards. With `load_format` "dummy" there are no
    right tokens, and nothing is done."""
    if config.load_format == "dummy":
        return
    num_ids = min(runner.spec.num_token_ids, runner.spec.vocab_size)
    golden = read_golden(Path(config.model_dir), num_ids)
    longest = runner.num_pages * runner.page_size
    longest = min(config.max_req_total_len or longest, longest)
    if golden is None or len(golden.prompt_ids) + len(golden.token_ids) > longest:
        count = min(_FEW_TOKENS, longest - 1)
        require_same(runner, _usual_prompt(num_ids)[: longest - count], count, config)
        return
    found = require_same(runner, golden.prompt_ids, len(golden.token_ids), config)
    is_exact = golden.data_type == "float32" and _is_exact(runner)
    if runner.ranks.rank > 0:
        return
    if difference := compare(golden.entries(), found, EXACT if is_exact else ROUNDED):
        raise ModelError(
            f"self-test: not the tokens of {GOLDEN_FILE}: {difference}. These are not the weights "
            "that the reference was made with, or not its other files. Try --verify_checksums; if "
            "they are right, write a new reference: glimmer check --write_golden"
        )


def require_same(
    runner: ModelRunner, prompt: list[int], count: int, config: ServeConfig
) -> list[TokenLogprob]:
    """`count` greedy tokens after the prompt, [] on ranks above 0. Raises ModelError if they are
    others in another batch, or the weights make no finite numbers."""
    most = min(config.batch_max_tokens or len(prompt), config.chunked_prefill_size or len(prompt))
    try:
        alone = generate(runner, prompt, count, most)
        crowded = generate(runner, prompt, count, most, _NEIGHBOURS)
    except FloatingPointError as error:
        raise ModelError(f"{config.model_dir}: the weights are damaged: {error}") from error
    if difference := compare(alone, crowded, EXACT if _is_exact(runner) else ROUNDED):
        raise ModelError(
            f"self-test: the same prompt gives other tokens alone than in a batch: {difference}. A "
            "kernel or this machine computes wrong numbers: try --disable_cudagraph, other "
            "attention backends, or another card"
        )
    return alone


def _is_exact(runner: ModelRunner) -> bool:
    return runner.forward.model.embedding.dtype == torch.float32


def compare(
    expected: Sequence[TokenLogprob], found: Sequence[TokenLogprob], tolerance: Tolerance
) -> str:
    """Describes the position at which tokens or log-probabilities differ too much; "" if none
    does."""
    differences: list[float] = []
    worst, worst_position = 0.0, 0
    for position, (right, ours) in enumerate(zip(expected, found, strict=True)):
        known = dict(right.top)
        ours_there = known.get(ours.token_id, right.top[-1][1])  # at most, if it is not listed
        if max(right.logprob - ours_there, abs(ours.logprob - ours_there)) > tolerance.token:
            return (
                f"at output position {position}, token {ours.token_id} with log-probability "
                f"{ours.logprob:.3f}, expected token {right.token_id} with {right.logprob:.3f}"
            )
        if ours.token_id != right.token_id:
            break
        here = [abs(known[token] - value) for token, value in ours.top if token in known]
        differences += here
        if max(here) > worst:
            worst, worst_position = max(here), position
    mean = sum(differences) / (len(expected) * _NUM_TOP) if expected else 0.0
    if mean <= tolerance.mean:
        return ""
    return (
        f"the log-probabilities of likely tokens differ by {mean:.3f} on average, most at output "
        f"position {worst_position}, by {worst:.3f}"
    )


def generate(
    runner: ModelRunner, prompt: list[int], count: int, most: int, neighbours: int = 0
) -> list[TokenLogprob]:
    """`count` greedy tokens after the prompt, with their likeliest alternatives; on ranks above 0
    nothing. A step has at most `most` tokens of the prompt. With `neighbours` the prompt comes in
    two chunks at least, beside so many other rows, if rows and pages suffice."""
    per_row = -(-(len(prompt) + count) // runner.page_size)
    row = min(neighbours, runner.num_rows - 1, runner.num_pages // per_row - 1)
    params = SamplingParams(max_new_tokens=count, num_logprobs=_NUM_TOP)
    others, most = list(range(row)), min(most, -(-len(prompt) // 2) if neighbours else most)
    admits = [RowAdmit(r, params, _pages(r, per_row), 0, 0, []) for r in (*others, row)]
    firsts = [PrefillChunk(r, 0, prompt[r + 1 : r + 2] or prompt[:1], sample=True) for r in others]
    found: list[TokenLogprob] = []
    for begin in range(0, len(prompt), most):
        ids, end = prompt[begin : begin + most], begin + most
        is_last = end >= len(prompt)
        chunk = PrefillChunk(row, begin, ids, is_last, -1 if is_last else prompt[end])
        chunks = [*firsts, chunk] if begin == 0 else [chunk]
        decode = [] if begin == 0 else others
        found = _run(runner, StepPlan(runner.epoch, 0, [], admits, [], chunks, decode), is_last)
        admits = []
    for _ in range(count - 1):
        found += _run(runner, StepPlan(runner.epoch, 0, [], [], [], [], [row, *others]), True)
    runner.run(StepPlan(runner.epoch, 0, [*others, row], [], [], [], []))
    return found


def _run(runner: ModelRunner, plan: StepPlan, is_sampled: bool) -> list[TokenLogprob]:
    """The token of the row under test: that of the last chunk, else of the first decode row."""
    rows = runner.run(plan).rows
    if not rows or not is_sampled:
        return []
    return rows[sum(chunk.sample for chunk in plan.prefill) - 1 if plan.prefill else 0].logprobs


def _pages(row: int, count: int) -> list[int]:
    return list(range(row * count, (row + 1) * count))


def _usual_prompt(num_ids: int) -> list[int]:
    return [(7919 * place + 13) % num_ids for place in range(_PATTERN)] * _REPEATS
