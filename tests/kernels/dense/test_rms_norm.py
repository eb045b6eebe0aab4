"""RMS norm against its formula."""

import pytest
import torch
from glimmer.kernels.dense.linear import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 5, 7)])
def test_matches_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    wide = x.double()
    scale = (wide.pow(2).sum(-1, keepdim=True) / shape[-1] + 1e-5).sqrt()
    expected = wide / scale * weight.double()
    got = rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # bf16 rounds twice: 2 * 2^-8
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_epsilon_keeps_zeros_finite() -> None:
    assert rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6).tolist() == [[0.0] * 4] * 2
