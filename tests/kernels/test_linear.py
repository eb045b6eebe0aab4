"""The product with a weight, on the CPU torch's own."""

import torch
from glimmer.kernels.linear import linear


def test_multiplies_by_the_transposed_weight() -> None:
    for num_tokens in (0, 1, 5):
        x, weight = torch.randn(num_tokens, 7)[:, :6], torch.randn(4, 6)
        torch.testing.assert_close(linear(x, weight), x @ weight.T)
