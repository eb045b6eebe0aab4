"""Log-probabilities, ranks and likeliest tokens of the Triton kernel against the reference."""

import pytest
import torch
from glimmer.kernels.sampling.logprobs_triton import launch_logprobs
from glimmer.kernels.sampling.sampling import logprobs_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("num_rows", "width", "num_top", "chunk"),
    [
        (3, 90, 5, 32),
        (1, 33, 0, 32),
        (2, 7, 7, 4),  # more than a chunk has
        *(pytest.param(n, 154_856, k, 4096, marks=pytest.mark.gpu) for n, k in
          ((1, 0), (1, 20), (7, 5), (256, 5))),
    ],
)  # fmt: skip
def test_equals_the_reference(num_rows: int, width: int, num_top: int, chunk: int) -> None:
    logits = torch.randn(num_rows, width, dtype=torch.float64).float() * 3
    logits[:, 1 : width - 7] += logits[:, 1 : width - 7].round()
    logits[0, width // 2] = -torch.inf
    ids = torch.randint(width, (num_rows,))
    temperature = torch.tensor([0.0, 1.0, 0.4]).repeat(86)[:num_rows]
    args = [x.to(DEVICE) for x in (logits, ids, temperature)]
    own, rank, top_ids, top = (x.cpu() for x in launch_logprobs(*args, num_top, chunk))
    expected = logprobs_reference(logits, ids, temperature, num_top)
    torch.testing.assert_close(own, expected[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(top, expected[3], atol=2e-5, rtol=1e-5)
    scaled = logits / torch.where(temperature > 0, temperature, 1)[:, None]
    assert torch.equal(rank, (logits > logits.gather(1, ids[:, None])).sum(1) + 1)
    assert torch.equal(scaled.gather(1, top_ids), scaled.gather(1, expected[2]))


def test_of_equal_tokens_the_first_are_named() -> None:
    logits = torch.zeros(1, 40, device=DEVICE)
    logits[0, 35] = 1
    ids = torch.tensor([39], device=DEVICE)
    _, rank, top_ids, _ = launch_logprobs(logits, ids, torch.ones(1, device=DEVICE), 3, 16)
    assert rank.tolist() == [2]
    assert top_ids.tolist() == [[35, 0, 1]]
