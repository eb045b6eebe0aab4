"""Expert choice against a plain loop."""

import math

import pytest
import torch
from glimmer.kernels.dense.linear import rms_norm
from glimmer.kernels.moe.router import RouterSettings, norm_route, route


def plain(
    logits: list[float], bias: list[float], k: int, groups: int, kept: int, norm: bool, scale: float
) -> dict[int, float]:
    scores = [1 / (1 + math.exp(-v)) for v in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // groups
    totals = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: -totals[g])[:kept]
    able = [e for e in range(len(logits)) if e // size in best]
    chosen = sorted(able, key=lambda e: -choice[e])[:k]
    total = sum(scores[e] for e in chosen) if norm else 1.0
    return {e: scores[e] / total * scale for e in chosen}


@pytest.mark.parametrize("num_tokens", [0, 1, 19])
@pytest.mark.parametrize(
    ("experts", "k", "groups", "kept", "norm"),
    [(6, 2, 1, 1, True), (16, 4, 4, 2, True), (12, 3, 6, 6, False), (5, 5, 5, 5, True)],
)
def test_matches_a_plain_loop(
    num_tokens: int, experts: int, k: int, groups: int, kept: int, norm: bool
) -> None:
    x, weight = torch.randn(num_tokens, 8), torch.randn(experts, 8)
    bias = torch.randn(experts) * 0.3
    ids, weights = route(x, weight, bias, RouterSettings(k, groups, kept, norm, 1.8))
    assert ids.shape == weights.shape == (num_tokens, k)
    for token in range(num_tokens):
        logits = (x[token].double() @ weight.double().T).tolist()
        expected = plain(logits, bias.tolist(), k, groups, kept, norm, 1.8)
        got = dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        assert got == pytest.approx(expected, abs=1e-5)


def test_bias_selects_but_does_not_weigh() -> None:
    bias = torch.tensor([0.0, 0.0, 10.0])
    settings = RouterSettings(1, 1, 1, False, 1.0)
    ids, weights = route(torch.zeros(1, 4), torch.zeros(3, 4), bias, settings)
    assert ids.tolist() == [[2]]
    assert weights.tolist() == [[0.5]]


def test_low_precision_input_is_scored_in_float32() -> None:
    x, weight = torch.randn(30, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    settings = RouterSettings(2, 1, 1, True, 1.0)
    wide = route(x.float(), weight.float(), torch.zeros(8), settings)
    got = route(x, weight, torch.zeros(8), settings)
    assert torch.equal(got[0], wide[0])
    assert torch.equal(got[1], wide[1])


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2)])
def test_the_norm_may_come_with_it(groups: int, kept: int) -> None:
    x, norm, weight = torch.randn(7, 16), torch.randn(16), torch.randn(8, 16)
    rest = (weight, torch.zeros(8), RouterSettings(2, groups, kept, True, 1.5), 1)
    normed, ids, weights = norm_route(x, norm, 1e-5, *rest)
    assert torch.equal(normed, rms_norm(x, norm, 1e-5))
    expected = route(normed, *rest)
    assert torch.equal(ids, expected[0])
    assert torch.equal(weights, expected[1])
