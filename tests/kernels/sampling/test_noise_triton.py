"""The Triton generator gives the bits of the torch one."""

import torch
from glimmer.kernels.sampling.noise_triton import launch_uniform
from glimmer.kernels.sampling.sampling import uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_equals_the_reference() -> None:
    extremes = [0, 1, 2**63 - 1, -(2**63), -1, 12345678901234]
    seeds = torch.tensor(extremes).repeat(40)
    positions = torch.arange(len(seeds)) * 4999
    rows = torch.randint(len(seeds), (len(seeds),))
    for index in (None, rows):
        on_device = [x if x is None else x.to(DEVICE) for x in (seeds, positions, index)]
        got = launch_uniform(*on_device)
        assert torch.equal(got.cpu(), uniform(seeds, positions, index))


def test_empty() -> None:
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert launch_uniform(nothing, nothing, None).shape == (0,)
