"""The Triton draws against the reference, token for token.

Sums are rounded differently, so a token may differ where the noise falls on the border of two:
noise is placed at the middle of what tokens have, or the drawn token's share must hold it.
"""

import math

import pytest
import torch
from glimmer.kernels.sampling import sampling
from glimmer.kernels.sampling.sampling import uniform
from glimmer.kernels.sampling.sampling_triton import pick, scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [
    (1, 1, 64),
    (3, 63, 64),
    (2, 200, 64),
    *(pytest.param(n, 154_856, 4096, marks=pytest.mark.gpu) for n in (1, 7, 256)),
]


def make_logits(num_rows: int, width: int, kind: str) -> torch.Tensor:
    """Rows inside wider ones, as padded logits are."""
    logits = torch.randn(num_rows, width + 24) * 3
    if kind == "ties":
        logits = (logits / 2).round()
    if kind == "banned":
        logits[:, : width // 2 + 1] = -torch.inf
        logits[:, width - 1] = 0
    return logits.to(DEVICE)[:, :width]


def draw(logits: torch.Tensor, noise: torch.Tensor, chunk: int) -> torch.Tensor:
    rows = torch.zeros(len(logits), dtype=torch.int64, device=DEVICE)
    temperature = torch.ones(1, device=DEVICE)
    return pick(scan(logits, rows, temperature, chunk), noise, rows, temperature)[0]


@pytest.mark.parametrize("kind", ["plain", "ties", "banned"])
@pytest.mark.parametrize(("num_rows", "width", "chunk"), SIZES)
def test_largest(num_rows: int, width: int, chunk: int, kind: str) -> None:
    logits = make_logits(num_rows, width, kind)
    ids, peaks = pick(scan(logits, None, None, chunk))
    expected = logits.cpu().max(-1)
    assert torch.equal(ids.cpu(), expected.indices)
    assert torch.equal(peaks.cpu(), expected.values)


@pytest.mark.parametrize("kind", ["plain", "ties", "banned"])
@pytest.mark.parametrize(("num_rows", "width", "chunk"), SIZES)
def test_draws(num_rows: int, width: int, chunk: int, kind: str) -> None:
    logits = make_logits(num_rows, width, kind)
    rows = torch.arange(num_rows).flip(0)
    temperature = torch.tensor([1.0, 0.0, 0.3, 5.0]).repeat(64)[:num_rows]
    noise = uniform(rows, rows + 3)
    found = scan(logits, rows.to(DEVICE), temperature.to(DEVICE), chunk)
    ids, peaks = pick(found, noise.to(DEVICE), rows.to(DEVICE), temperature.to(DEVICE))
    expected = sampling.draw_reference(logits.cpu(), noise, rows, temperature)
    assert (ids.cpu() != expected[0]).sum() <= num_rows // 100  # noise on a border
    assert torch.equal(peaks.cpu(), expected[1])


@pytest.mark.parametrize("num_tokens", [5, 64, 300])
def test_every_token_has_its_place_and_share(num_tokens: int) -> None:
    logits = torch.randn(num_tokens) * 2
    shares = logits.double().softmax(0)
    middles = shares.cumsum(0) - shares / 2
    some = torch.arange(0, num_tokens, max(1, num_tokens // 6))
    drawn = draw(logits.to(DEVICE).expand(len(some), -1), middles[some].to(DEVICE), 64)
    assert drawn.tolist() == some.tolist()


def test_ends_of_the_noise_hit_possible_tokens() -> None:
    logits = torch.full((2, 200), -torch.inf, device=DEVICE)
    logits[:, 70], logits[:, 140] = 1.0, 2.0
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64, device=DEVICE)
    assert draw(logits, ends, 64).tolist() == [70, 140]


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_show_in_the_peaks(bad: float) -> None:
    logits = torch.zeros(2, 100, device=DEVICE)
    logits[1, 70] = bad
    assert pick(scan(logits, None, None, 64))[1].isfinite().tolist() == [True, False]
    assert 0 <= draw(logits, torch.full((2,), 0.5, device=DEVICE).double(), 64)[1] < 100
