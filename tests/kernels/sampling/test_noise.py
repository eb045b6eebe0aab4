"""The counter-based generator: known values, uniform, independent of the batch."""

import torch
from glimmer.kernels.sampling.sampling import uniform

_MASK = (1 << 64) - 1


def splitmix(state: int) -> int:
    """One output of splitmix64 in unbounded integers."""
    z = state & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def test_equals_integer_arithmetic_at_the_extremes() -> None:
    gamma = 0x9E3779B97F4A7C15
    cases = [(s, p) for s in (0, 1, 2**63 - 1, -1, 12345678901234) for p in (0, 1, 999_999)]
    seeds, positions = (torch.tensor(column) for column in zip(*cases, strict=True))
    expected = [
        (splitmix(splitmix((s & _MASK) + gamma) + (p + 1) * gamma) >> 11) * 2.0**-53
        for s, p in cases
    ]
    assert uniform(seeds, positions).tolist() == expected


def test_first_output_is_that_of_published_splitmix64() -> None:
    """Seed 1234567 gives 6457827717110365317 first; our inner round is that function."""
    assert splitmix(1234567 + 0x9E3779B97F4A7C15) == 6457827717110365317


def test_uniform_over_positions_and_over_seeds() -> None:
    n = 100_000
    for seeds, positions in (
        (torch.full((n,), 7), torch.arange(n)),
        (torch.arange(n), torch.zeros(n, dtype=torch.int64)),
    ):
        values = uniform(seeds, positions)
        assert values.min() >= 0
        assert values.max() < 1
        counts = torch.histc(values.float(), 50, 0, 1)
        chi = ((counts - n / 50) ** 2 / (n / 50)).sum().item()
        assert chi < 90  # 49 degrees of freedom: p = 0.0003
        neighbours = torch.corrcoef(torch.stack((values[:-1], values[1:])))[0, 1]
        assert abs(neighbours) < 0.015


def test_no_batch_dependence_and_empty() -> None:
    seeds, positions = torch.arange(10), torch.arange(10) * 3
    whole = uniform(seeds, positions)
    assert torch.equal(whole[4:5], uniform(seeds[4:5], positions[4:5]))
    assert uniform(seeds[:0], positions[:0]).shape == (0,)
