"""The Triton product per head against einsum, and rotary keys of every head."""

import pytest
import torch
from glimmer.kernels.attention.mla_projections_triton import launch_head_product, launch_spread_rope

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("count", "heads", "num_in", "num_out", "tail"),
    [(0, 2, 4, 4, 0), (1, 3, 12, 24, 4), (17, 2, 48, 70, 16), (70, 1, 20, 33, 0)],
)
def test_products_and_copied_tail(
    count: int, heads: int, num_in: int, num_out: int, tail: int, transposed: bool
) -> None:
    x = torch.randn(count, heads, num_in + tail, device=DEVICE).to(DTYPE)
    shape = (heads, num_out, num_in) if transposed else (heads, num_in + 3, num_out)
    weight = torch.randn(shape, device=DEVICE).to(DTYPE)
    weight = weight.transpose(1, 2) if transposed else weight[:, 3:]
    got = launch_head_product(x, weight, tail)
    expected = torch.einsum("the,heo->tho", x[..., :num_in].float(), weight.float())
    tolerance = 2e-2 if CUDA else 1e-4
    torch.testing.assert_close(got[..., :num_out].float(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(got[..., num_out:], x[..., num_in:])


def test_every_head_gets_the_rotary_part() -> None:
    keys, latents = torch.zeros(6, 3, 9, device=DEVICE), torch.randn(6, 11, device=DEVICE)
    launch_spread_rope(keys, latents, 4)
    assert torch.equal(keys[..., 5:], latents[:, None, 7:].expand(-1, 3, -1))
    assert not keys[..., :5].any()
