"""Few-row products against torch. Tolerance: float32 sums, one rounding to the type."""

import pytest
import torch
from glimmer.kernels.dense.linear import linear, norm_linear, rms_norm_reference
from glimmer.kernels.dense.linear_triton import (
    few_tile,
    linear_few,
    linear_one,
    norm_tile,
    one_tile,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float16  # the interpreter gets bfloat16 products wrong
STEP = torch.finfo(DTYPE).eps


def case(num_tokens: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x as a view with a row stride, weight, exact product."""
    x = torch.randn(num_tokens, k + 16, device=DEVICE).to(DTYPE)[:, :k]
    weight = (torch.randn(n, k, device=DEVICE) * k**-0.5).to(DTYPE)
    return x, weight, x.float() @ weight.float().T


def check(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == DTYPE
    torch.testing.assert_close(got.float(), expected, atol=STEP, rtol=STEP)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize(("n", "k"), [(50, 96), (7, 33)])
def test_each_token_by_itself(num_tokens: int, n: int, k: int) -> None:
    x, weight, expected = case(num_tokens, n, k)
    check(linear_one(x, weight, (4, 64, 4)), expected)
    check(linear_one(x, weight, one_tile(k)), expected)
    there = torch.randn(num_tokens, n, device=DEVICE).to(DTYPE)
    total = there.float() + expected
    assert linear_one(x, weight, (4, 64, 4), add_to=there) is there
    check(there, total)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize(("n", "k"), [(50, 96), (7, 33)])
def test_each_token_normed_first(num_tokens: int, n: int, k: int) -> None:
    x, weight, _ = case(num_tokens, n, k)
    norm = torch.randn(k, device=DEVICE).to(DTYPE)
    expected = rms_norm_reference(x, norm, 1e-5).float() @ weight.float().T
    for tile in ((4, 64, 4), norm_tile(k)):
        check(linear_one(x, weight, tile, norm=norm, eps=1e-5), expected)


@pytest.mark.parametrize("num_tokens", [2, 17])
@pytest.mark.parametrize(("n", "k"), [(50, 96), (33, 320)])
def test_few_tokens(num_tokens: int, n: int, k: int) -> None:
    x, weight, expected = case(num_tokens, n, k)
    check(linear_few(x, weight, (4, 16, 32, 2)), expected)
    check(linear_few(x, weight, (2, 16, 64, 3)), expected)
    there = torch.randn(num_tokens, n, device=DEVICE).to(DTYPE)
    total = there.float() + expected
    assert linear_few(x, weight, (2, 16, 32, 2), add_to=there) is there
    check(there, total)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight, _ = case(9, 40, 128)
    tile = few_tile(40, 128)
    assert torch.equal(linear_few(x, weight, tile)[2:5], linear_few(x[2:5], weight, tile))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "k", "num_tokens"),
    [(1344, 2048, t) for t in (1, 2, 3, 7, 16, 17, 32, 33, 64, 100, 1000)]
    + [(*shape, t) for shape in ((5120, 768), (2048, 5120), (200, 104)) for t in (1, 7)],
)
def test_on_the_card(n: int, k: int, num_tokens: int) -> None:
    x, weight, expected = case(num_tokens, n, k)
    got = linear(x, weight)
    check(got, expected)
    assert torch.equal(got, linear(x, weight))
    there = torch.randn_like(got)
    total = there.float() + expected
    linear(x, weight, add_to=there)
    torch.testing.assert_close(there.float(), total, atol=2 * STEP, rtol=STEP)
    norm = torch.randn(k, device=DEVICE).to(DTYPE)
    expected = rms_norm_reference(x, norm, 1e-5).float() @ weight.float().T
    found = norm_linear(x, norm, 1e-5, weight)
    torch.testing.assert_close(found.float(), expected, atol=4 * STEP, rtol=2 * STEP)
