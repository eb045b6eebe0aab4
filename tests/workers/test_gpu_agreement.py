"""A card in bfloat16 against the CPU in float32: the same model up to rounding. Prints figures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.sampling import SamplingParams

pytestmark = pytest.mark.gpu
OUTPUTS = 24
_CLOSE = 0.35  # logarithmic: how far ahead a token may be that the other side does not choose


def prompts(count: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 300, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def read(runner: Any, ids: list[int], num_top: int) -> list[Any]:
    """What the runner thinks of each token of a text but the first."""
    params = SamplingParams(max_new_tokens=1, num_prompt_logprobs=num_top)
    pages = list(range(-(-len(ids) // 64) + 1))
    chunk = PrefillChunk(0, 0, ids, sample=True)
    plan = StepPlan(0, 0, [], [RowAdmit(0, params, pages, 0, 0, [])], [], [chunk], [])
    return list(runner.run(plan).prompt_logprobs[0])


@pytest.mark.parametrize("variant", ["plain", "grouped", "all_sparse"])
def test_greedy_agreement_over_50_prompts(
    make_reference: Any, make_runner: Any, driver_of: Any, variant: str
) -> None:
    path: Path = make_reference(variant).path
    exact = make_runner(path, data_type="float32")
    card = make_runner(path, device="cuda", data_type="bfloat16")
    greedy = SamplingParams(max_new_tokens=OUTPUTS)
    agreed = total = 0
    errors = []
    for prompt in prompts(50, 150):
        outputs = driver_of(exact.run, 64).generate([prompt], greedy, None)[0].outputs
        text = prompt + outputs
        wanted, found = read(exact, text, 2), read(card, text, 2)
        for a, b in zip(wanted[-OUTPUTS:], found[-OUTPUTS:], strict=True):
            total += 1
            agreed += b.rank == 1
            if b.rank > 1:
                assert a.logprob - a.top[1][1] < _CLOSE, "a clear choice of the CPU was missed"
        errors += [abs(a.logprob - b.logprob) for a, b in zip(wanted, found, strict=True)]
    spread = torch.tensor(errors)
    print(f"{variant}: {agreed} of {total} greedy tokens agree; log-probability error "
          f"median {spread.median():.4f}, largest {spread.max():.4f}")  # fmt: skip
    assert agreed / total > 0.9
    assert spread.median() < 0.03


@pytest.mark.parametrize("chunk_size", [7, 64, None])
def test_chunks_and_batches_change_no_clear_choice(
    make_reference: Any, make_runner: Any, driver_of: Any, chunk_size: int | None
) -> None:
    path: Path = make_reference("plain").path
    runner = make_runner(path, device="cuda", data_type="bfloat16")
    greedy = SamplingParams(max_new_tokens=OUTPUTS, num_logprobs=2)
    texts = prompts(12, 150)
    alone = [driver_of(runner.run, 64).generate([p], greedy, None)[0] for p in texts]
    together = driver_of(runner.run, 64).generate(texts, greedy, chunk_size)
    for a, b in zip(alone, together, strict=True):
        pairs = enumerate(zip(a.outputs, b.outputs, strict=True))
        place = next((i for i, (x, y) in pairs if x != y), None)
        if place is not None:
            top = a.logprobs[place].top
            assert top[0][1] - top[1][1] < _CLOSE
