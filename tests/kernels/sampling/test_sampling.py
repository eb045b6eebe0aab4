"""Sampling formulas against plain Python, and distributions against their expectation."""

import math

import pytest
import torch
from glimmer.kernels.sampling import sampling
from glimmer.kernels.sampling.sampling import uniform

N = 20_000


def noise(n: int, seed: int = 3) -> torch.Tensor:
    return uniform(torch.full((n,), seed), torch.arange(n))


def draw(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """At temperature 1."""
    rows = torch.zeros(len(logits), dtype=torch.int64)
    return sampling.draw(logits, noise, rows, torch.ones(1))[0]


def draw_truncated(
    logits: torch.Tensor, noise: torch.Tensor, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> torch.Tensor:
    """The same, one rule for all rows."""
    rows = torch.zeros(len(logits), dtype=torch.int64)
    rules = (torch.tensor([top_k]), torch.tensor([float(top_p)]), torch.tensor([float(min_p)]))
    return sampling.draw_truncated(logits, noise, rows, torch.ones(1), *rules)[0]


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


def test_allow_lists_touch_only_their_rows() -> None:
    logits = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, 6.0]])
    allowed = torch.tensor([[False, True, True]])
    masked = sampling.allow_only(logits, torch.tensor([0]), allowed)
    assert masked is logits
    assert masked.tolist() == [[-math.inf, -2.0, 3.0], [4.0, 5.0, 6.0]]


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
    ids = draw(torch.tensor([logits]).expand(N, -1), noise(N))
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
    ids = draw_truncated(torch.tensor([logits]).expand(N, -1), noise(N), top_k, top_p, min_p)
    mass = [p if i in kept else 0.0 for i, p in enumerate(softmax(logits))]
    check_distribution(ids, [p / sum(mass) for p in mass])


def test_top_k_and_top_p_look_at_the_same_list() -> None:
    """top_p is a share of all tokens, not of those that top_k left: 0.3 + 0.3 < 0.65 keeps a
    third token although the two first are all of a renormalised top-2."""
    logits = torch.tensor([0.3, 0.3, 0.2, 0.2]).log().expand(N, -1)
    ids = draw_truncated(logits, noise(N), 3, 0.65)
    check_distribution(ids, [0.375, 0.375, 0.25, 0.0])


def test_every_extreme_of_the_noise_hits_a_possible_token() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, ends).tolist() == [1, 3]
    assert draw_truncated(logits, ends).tolist() == [1, 3]
    assert draw_truncated(logits, ends, top_k=4).tolist() == [1, 3]


def test_draws_are_inverse_cdf_in_the_order_of_ids() -> None:
    """0.1 0.4 0.2 0.3: kept by top_p 0.6 are ids 1 and 3, in shares 4/7 and 3/7."""
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(5, -1)
    places = torch.tensor([0.0, 0.09, 0.11, 0.56, 0.72], dtype=torch.float64)
    assert draw(logits, places).tolist() == [0, 0, 1, 2, 3]
    assert draw_truncated(logits, places, top_p=0.6).tolist() == [1, 1, 1, 1, 3]


def test_of_equal_tokens_the_first_are_kept() -> None:
    logits = torch.zeros(64, 10)
    for rules in ({"top_k": 3}, {"top_p": 0.25}):
        assert set(draw_truncated(logits, noise(64), **rules).tolist()) == {0, 1, 2}
    assert len(set(draw_truncated(logits, noise(64), min_p=1.0).tolist())) == 10


def test_rows_find_their_parameters_and_greedy_ones_take_the_first_largest() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, -torch.inf]]).expand(3, -1)
    high = torch.full((3,), 0.99, dtype=torch.float64)
    temperature, rows = torch.tensor([0.0, 1.0, 100.0]), torch.tensor([2, 0, 1])
    ids, peaks = sampling.draw(logits, high, rows, temperature)
    assert ids.tolist() == [2, 1, 2]
    assert peaks.tolist() == [5, 5, 5]
    assert sampling.greedy(logits)[0].tolist() == [1, 1, 1]
    none = (torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.zeros(3))
    assert sampling.draw_truncated(logits, high, rows, temperature, *none)[0].tolist() == [2, 1, 2]


def test_numbers_that_are_not_finite_show_in_the_peaks() -> None:
    logits = torch.tensor([[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf], [0.0, 1.0]])
    for _, peaks in (
        sampling.greedy(logits),
        sampling.draw(logits, noise(4), torch.arange(4), torch.ones(4)),
    ):
        assert peaks.isfinite().tolist() == [False, False, False, True]


def test_no_rows() -> None:
    empty = torch.empty(0, 7)
    assert draw(empty, noise(0)).shape == (0,)
    assert draw_truncated(empty, noise(0)).shape == (0,)
    assert sampling.greedy(empty)[0].shape == (0,)


def test_logprobs_rank_and_top() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]])
    for temperature in (0.0, 1.0, 2.0):
        scale = torch.tensor([temperature])
        own, rank, top_ids, top = sampling.logprobs(logits, torch.tensor([2]), scale, 2)
        table = [math.log(p) for p in softmax([x / (temperature or 1) for x in (1.0, 3.0, 2.0)])]
        assert own.tolist() == pytest.approx([table[2]])
        assert rank.tolist() == [2]
        assert top_ids.tolist() == [[1, 2]]
        assert top[0].tolist() == pytest.approx([table[1], table[2]])
    assert sampling.logprobs(logits, torch.tensor([0]), torch.ones(1), 9)[3].shape == (1, 4)
