"""The Triton norm against the reference: bit for bit but for the order of one sum."""

import pytest
import torch
from glimmer.kernels.dense.linear import rms_norm, rms_norm_reference
from glimmer.kernels.dense.rms_norm_triton import launch_rms_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float16  # the interpreter cuts bfloat16 off


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """One step of the type where the mean square rounds differently."""
    step = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got, expected, rtol=2 * step, atol=step)


@pytest.mark.parametrize("dtype", [torch.float32, DTYPE])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 96), (5, 200)])
def test_strided_rows(rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, width + 24, device=DEVICE).to(dtype)[:, 8 : 8 + width]
    weight = torch.randn(width, device=DEVICE).to(dtype)
    close(launch_rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 33, 64, 100, 256, 512, 1000, 8192])
@pytest.mark.parametrize("width", [96, 128, 512, 768, 2048])
def test_on_the_card(rows: int, width: int) -> None:
    x = torch.randn(rows, width + 576, device=DEVICE).bfloat16()[:, 512 : 512 + width]
    weight = torch.randn(width, device=DEVICE).bfloat16()
    close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
