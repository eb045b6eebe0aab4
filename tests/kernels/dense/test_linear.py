"""The product with a weight, on the CPU torch's own."""

import torch
from glimmer.kernels.dense.linear import linear, norm_linear, rms_norm


def test_multiplies_by_the_transposed_weight() -> None:
    for num_tokens in (0, 1, 5):
        x, weight = torch.randn(num_tokens, 7)[:, :6], torch.randn(4, 6)
        torch.testing.assert_close(linear(x, weight), x @ weight.T)


def test_adds_in_place_and_norms_first() -> None:
    for num_tokens in (0, 1, 5):
        x, weight, norm = torch.randn(num_tokens, 6), torch.randn(4, 6), torch.randn(6)
        there = torch.randn(num_tokens, 4)
        old = there.clone()
        assert linear(x, weight, add_to=there) is there
        torch.testing.assert_close(there, old + x @ weight.T)
        out = torch.empty_like(there)
        found = norm_linear(x, norm, 1e-5, weight, out)
        assert found is out
        torch.testing.assert_close(found, rms_norm(x, norm, 1e-5) @ weight.T)
