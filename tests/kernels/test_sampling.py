"""Sampling formulas against plain Python, and distributions against their expectation."""

import math

import pytest
import torch
from glimmer.kernels import sampling
from glimmer.kernels.noise import uniform

N = 20_000


def noise(n: int, seed: int = 3) -> torch.Tensor:
    return uniform(torch.full((n,), seed), torch.arange(n))


def check_distribution(ids: torch.Tensor, expected: list[float]) -> None:
    """Chi-square at p of about 1e-4; tokens of probability 0 must not appear at all."""
    counts = ids.bincount(minlength=len(expected)).tolist()
    assert [c for c, p in zip(counts, expected, strict=True) if p == 0 and c] == []
    pairs = [(c, p * len(ids)) for c, p in zip(counts, expected, strict=True) if p > 0]
    chi = sum((c - e) ** 2 / e for c, e in pairs)
    freedom = len(pairs) - 1
    assert chi <= freedom + 4 * math.sqrt(2 * freedom) + 10


def softmax(values: list[float]) -> list[float]:
    total = sum(map(math.exp, values))
    return [math.exp(v) / total for v in values]


def test_penalties_follow_the_stated_order() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    counts = torch.tensor([[3, 1, 0, 0]], dtype=torch.int32)
    got = sampling.penalise(
        logits, counts, torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([0.25])
    )
    assert got.tolist() == [[2 / 2 - 1.5 - 0.25, -2 * 2 - 0.5 - 0.25, 1.0, -1.0]]
    neutral = sampling.penalise(
        logits, counts, torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.0])
    )
    assert torch.equal(neutral, logits)


def test_boost_bias_and_allow_touch_only_their_pairs() -> None:
    logits = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, 6.0]])
    at = (torch.tensor([0, 0]), torch.tensor([1, 2]))
    boosted = sampling.boost(logits, *at, torch.tensor([0.5, 2.0]))
    assert boosted.tolist() == [[1.0, -1.0, 9.0], [4.0, 5.0, 6.0]]
    repeated = (torch.tensor([1, 1, 0]), torch.tensor([0, 0, 2]))
    biased = sampling.add_bias(logits, *repeated, torch.tensor([1.0, 2.0, -torch.inf]))
    assert biased.tolist() == [[1.0, -2.0, -math.inf], [7.0, 5.0, 6.0]]
    allowed = torch.tensor([[False, True, True]])
    masked = sampling.allow_only(logits.clone(), torch.tensor([0]), allowed)
    assert masked.tolist() == [[-math.inf, -2.0, 3.0], [4.0, 5.0, 6.0]]
    assert logits.tolist() == [[1.0, -2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize("num_ids", [1, 31, 32, 33, 64, 584])
def test_bits_are_unpacked_lowest_first(num_ids: int) -> None:
    generator = torch.Generator().manual_seed(num_ids)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (3, -(-num_ids // 32)), generator=generator)
    expected = [
        [bool(int(row[i // 32]) >> i % 32 & 1) for i in range(num_ids)] for row in words.tolist()
    ]
    assert sampling.unpack_bits(words.int(), num_ids).tolist() == expected


def test_draw_follows_softmax() -> None:
    logits = [0.5, -math.inf, 2.0, 1.0, -1.0, -30.0]
    ids = sampling.draw(torch.tensor([logits]).expand(N, -1), noise(N))
    expected = softmax(logits)
    expected[5] = 0.0  # 1e-14: never in 20,000 draws
    check_distribution(ids, expected)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (0, 1.0, 0.0, {0, 1, 2, 3, 4}),
        (3, 1.0, 0.0, {2, 3, 0}),
        (1, 1.0, 0.0, {2}),
        (99, 1.0, 0.0, {0, 1, 2, 3, 4}),
        (0, 0.5, 0.0, {2}),  # the first has 0.56
        (0, 0.57, 0.0, {2, 3}),
        (0, 1e-9, 0.0, {2}),
        (0, 1.0, 0.3, {2, 3}),  # 0.56 * 0.3 = 0.17 < 0.21
        (0, 1.0, 1.0, {2}),
        (2, 0.9, 0.01, {2, 3}),
        (4, 0.8, 0.0, {2, 3, 0}),
    ],
)
def test_truncated_draw_keeps_the_head_and_its_proportions(
    top_k: int, top_p: float, min_p: float, kept: set[int]
) -> None:
    logits = [0.5, -1.0, 2.0, 1.0, 0.0]
    ids = sampling.draw_truncated(
        torch.tensor([logits]).expand(N, -1),
        noise(N),
        torch.full((N,), top_k),
        torch.full((N,), top_p),
        torch.full((N,), min_p),
    )
    mass = [p if i in kept else 0.0 for i, p in enumerate(softmax(logits))]
    check_distribution(ids, [p / sum(mass) for p in mass])


def test_top_k_and_top_p_look_at_the_same_list() -> None:
    """top_p is a share of all tokens, not of those that top_k left: 0.3 + 0.3 < 0.65 keeps a
    third token although the two first are all of a renormalised top-2."""
    logits = torch.tensor([0.3, 0.3, 0.2, 0.2]).log().expand(N, -1)
    ids = sampling.draw_truncated(
        logits, noise(N), torch.full((N,), 3), torch.full((N,), 0.65), torch.zeros(N)
    )
    check_distribution(ids, [0.375, 0.375, 0.25, 0.0])


def test_every_extreme_of_the_noise_hits_a_possible_token() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert sampling.draw(logits, ends).tolist() == [1, 3]
    none = (torch.zeros(2, dtype=torch.int64), torch.ones(2), torch.zeros(2))
    assert sampling.draw_truncated(logits, ends, *none).tolist() == [3, 1]


def test_no_rows() -> None:
    empty = torch.empty(0, 7)
    assert sampling.draw(empty, noise(0)).shape == (0,)
    k, p = torch.empty(0, dtype=torch.int64), torch.empty(0)
    assert sampling.draw_truncated(empty, noise(0), k, p, p).shape == (0,)


def test_logprobs_rank_and_top() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]])
    own, rank, top_ids, top = sampling.logprobs(logits, torch.tensor([2]), 2)
    table = [math.log(p) for p in softmax([1.0, 3.0, 2.0])]
    assert own.tolist() == pytest.approx([table[2]])
    assert rank.tolist() == [2]
    assert top_ids.tolist() == [[1, 2]]
    assert top[0].tolist() == pytest.approx([table[1], table[2]])
    assert sampling.logprobs(logits, torch.tensor([0]), 9)[3].shape == (1, 4)
