"""A card in bfloat16 against the CPU in float32: the same model up to rounding. Prints figures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.deploy.demo.run import MODEL_DIR
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.sampling import SamplingParams
from models import held_out_prompts

pytestmark = pytest.mark.gpu
OUTPUTS = 24
_CLOSE = 0.7  # logarithmic: how far ahead a token may be that the other side does not choose


def prompts(count: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 300, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def read(runner: Any, ids: list[int], num_top: int) -> list[Any]:
    """Log-probabilities of each token of a text but the first."""
    params = SamplingParams(max_new_tokens=1, num_prompt_logprobs=num_top)
    pages = list(range(-(-len(ids) // 64) + 1))
    chunk = PrefillChunk(0, 0, ids, sample=True)
    plan = StepPlan(0, 0, [], [RowAdmit(0, params, pages, 0, 0, [])], [], [chunk], [])
    return list(runner.run(plan).prompt_logprobs[0])


@pytest.mark.parametrize("variant", ["plain", "grouped", "all_sparse", "demo"])
def test_greedy_agreement_over_50_prompts(
    make_reference: Any, make_runner: Any, driver_of: Any, variant: str
) -> None:
    """A card is about as far from float32 as the CPU is in bfloat16: by rounding alone."""
    if variant == "demo":
        path, texts = MODEL_DIR, held_out_prompts(50, 500)
    else:
        path, texts = make_reference(variant).path, prompts(50, 150)
    exact = make_runner(path, data_type="float32")
    rounded = make_runner(path, data_type="bfloat16")
    card = make_runner(path, device="cuda", data_type="bfloat16")
    greedy = SamplingParams(max_new_tokens=OUTPUTS)
    agreed = [0, 0]
    values: list[float] = []
    errors: list[list[float]] = [[], []]
    for prompt in texts:
        text = prompt + driver_of(exact.run, 64).generate([prompt], greedy, None)[0].outputs
        wanted = read(exact, text, 0)
        values += [entry.logprob for entry in wanted]
        for side, runner in enumerate((rounded, card)):
            found = read(runner, text, 0)
            agreed[side] += sum(entry.rank == 1 for entry in found[-OUTPUTS:])
            pairs = zip(wanted, found, strict=True)
            errors[side].extend(abs(a.logprob - b.logprob) for a, b in pairs)
    medians = [torch.tensor(side).median().item() for side in errors]
    relative = [torch.tensor(side).norm() / torch.tensor(values).norm() for side in errors]
    print(f"{variant}: of {50 * OUTPUTS} greedy tokens CPU bfloat16 and card agree with float32 in "
          f"{agreed}; error of log-probabilities: median {medians[0]:.5f} and {medians[1]:.5f}, "
          f"relative {relative[0]:.5f} and {relative[1]:.5f}")  # fmt: skip
    assert agreed[1] > agreed[0] - 0.03 * 50 * OUTPUTS
    assert medians[1] < 1.3 * medians[0] + 1e-4  # the demo model is sure of most tokens


@pytest.mark.parametrize("chunk_size", [7, 64, None])
def test_chunks_and_batches_change_no_clear_choice(
    make_reference: Any,
    make_runner: Any,
    driver_of: Any,
    gap_where_parted: Any,
    chunk_size: int | None,
) -> None:
    path: Path = make_reference("plain").path
    runner = make_runner(path, device="cuda", data_type="bfloat16")
    greedy = SamplingParams(max_new_tokens=OUTPUTS, num_logprobs=2)
    texts = prompts(12, 150)
    alone = [driver_of(runner.run, 64).generate([p], greedy, None)[0] for p in texts]
    together = driver_of(runner.run, 64).generate(texts, greedy, chunk_size)
    for a, b in zip(alone, together, strict=True):
        gap = gap_where_parted(a, b)
        assert gap is None or gap < _CLOSE
