"""Numbers within limits: all of them, and no others."""

import json
import random
from fractions import Fraction

import pytest
from glimmer.frontend.grammar import numbers
from glimmer.frontend.grammar.ebnf import Rules
from glimmer.frontend.grammar.problems import SourceError
from grammars import Walk


def text(expression: str) -> str:
    rules = Rules()
    return rules.text([rules.add([expression])])


def test_integers_reach_every_value_of_a_small_range(walk: Walk) -> None:
    grammar = text(numbers.integer((Fraction(-2), Fraction(11))))
    found = {int(out) for seed in range(400) if (out := walk(grammar, seed))}
    assert found == set(range(-2, 12))


@pytest.mark.parametrize("seed", range(12))
def test_random_limits_hold(seed: int, walk: Walk) -> None:
    rng = random.Random(seed)
    low = rng.randint(-5000, 5000)
    high = low + rng.choice((0, 1, 9, 10, 555, 10_000))
    limits = rng.choice(((low, high), (low, None), (None, high)))
    bounds = tuple(None if x is None else Fraction(x, rng.choice((1, 8))) for x in limits)
    if None not in bounds:
        bounds = (Fraction(low, 8), Fraction(high, 8) + 1)
    integers, decimals = text(numbers.integer(bounds)), text(numbers.number(bounds))
    for n in range(25):
        for grammar in (integers, decimals):
            value = Fraction(str(json.loads(walk(grammar, n) or "x")))
            assert bounds[0] is None or value >= bounds[0]
            assert bounds[1] is None or value <= bounds[1]


def test_no_limits_and_no_numbers(walk: Walk) -> None:
    for grammar, kind in ((numbers.INTEGER, int), (numbers.NUMBER, (int, float))):
        for seed in range(30):
            assert isinstance(json.loads(walk(text(grammar), seed) or "x"), kind)
    with pytest.raises(SourceError, match="no integer"):
        numbers.integer((Fraction(1, 4), Fraction(3, 4)))
    with pytest.raises(SourceError, match="no number"):
        numbers.number((Fraction(1, 10**9), Fraction(2, 10**9)))
    with pytest.raises(SourceError):
        numbers.integer((Fraction(5), Fraction(3)))
