"""Gated MLPs against one token and one expert at a time."""

import pytest
import torch
from glimmer.kernels.moe.experts import gated_mlp, moe

HIDDEN, WIDTH, EXPERTS = 6, 5, 4


def one(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up[:WIDTH] @ x, gate_up[WIDTH:] @ x
    return down @ (gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_dense_matches_the_formula(num_tokens: int) -> None:
    x = torch.randn(num_tokens, HIDDEN)
    gate_up, down = torch.randn(2 * WIDTH, HIDDEN), torch.randn(HIDDEN, WIDTH)
    got = gated_mlp(x, gate_up, down)
    assert got.shape == x.shape
    for token in range(num_tokens):
        torch.testing.assert_close(got[token], one(x[token], gate_up, down), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [0, 1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [range(EXPERTS), [2]])
def test_mixture_matches_a_loop(num_tokens: int, dtype: torch.dtype, experts: list[int]) -> None:
    """Also when some experts, or all but one, get no token."""
    x = torch.randn(num_tokens, HIDDEN).to(dtype)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN).to(dtype)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH).to(dtype)
    k = min(2, len(experts))
    options = torch.tensor(list(experts))
    ids = options[torch.rand(num_tokens, len(experts)).argsort(-1)[:, :k]]
    weights = torch.rand(num_tokens, k)
    got = moe(x, ids, weights, gate_up, down)
    assert (got.dtype, got.shape) == (dtype, x.shape)
    for token in range(num_tokens):
        expected = torch.zeros(HIDDEN)
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            part = one(x[token].float(), gate_up[expert].float(), down[expert].float())
            expected += weight * part
        tolerance = 1e-4 if dtype == torch.float32 else 0.25  # bf16: products of size 30
        torch.testing.assert_close(got[token].float(), expected, atol=tolerance, rtol=1e-2)


def test_results_are_added_in_place() -> None:
    x, gate_up = torch.randn(3, HIDDEN), torch.randn(EXPERTS, 2 * WIDTH, HIDDEN)
    down, weights = torch.randn(EXPERTS, HIDDEN, WIDTH), torch.rand(3, 2)
    ids = torch.tensor([[0, 1], [2, 3], [3, 0]])
    there = torch.randn(3, HIDDEN)
    expected = there + moe(x, ids, weights, gate_up, down) + gated_mlp(x, gate_up[0], down[0])
    assert moe(x, ids, weights, gate_up, down, there) is there
    assert gated_mlp(x, gate_up[0], down[0], there) is there
    torch.testing.assert_close(there, expected)
