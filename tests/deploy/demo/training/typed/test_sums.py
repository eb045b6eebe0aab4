import operator
import re

import pytest
from glimmer.deploy.demo.training.typed.sums import make_numbers, solve, spelled, sum_turn
from glimmer.deploy.demo.training.words import Source

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def test_a_calculation_is_written_as_on_paper() -> None:
    assert solve(348, "+", 276) == ("8+6=14 → 4; 4+7+1=12 → 24; 3+2+1=6 → 624", "348 + 276 = 624.")
    assert solve(802, "-", 455)[0] == "2+10-5=7 → 7; 0+10-5-1=4 → 47; 8-4-1=3 → 347"
    assert solve(999, "/", 27)[0] == "99: 27*3=81, rest 18 → 3; 189: 27*7=189, rest 0 → 37"
    assert solve(7, "*", 8) == ("", "7 * 8 = 56.")
    assert solve(100, "/", 7)[1] == "100 / 7 = 14 rest 2."
    assert solve(3, "-", 20)[1] == "3 - 20 = -17."
    with pytest.raises(ValueError, match="no such sign"):
        solve(1, "^", 2)


@pytest.mark.parametrize("sign", [*SIGNS, "/"])
def test_every_step_and_every_result_is_right(sign: str) -> None:
    for seed in range(1500):
        a, b = make_numbers(Source(seed), sign)
        steps, statement = solve(a, sign, b)
        result = re.findall(r"-?\d+", statement.split(" = ")[1])
        if sign == "/":
            assert int(result[0]) * b + int(result[1] if len(result) > 1 else 0) == a
        else:
            assert int(result[0]) == SIGNS[sign](a, b)
        if steps:
            assert re.findall(r"-?\d+", steps)[-1] == result[0]
        for left, right in re.findall(r"(?<![\d+*-])([\d+*-]*\d[+*-]\d+)=(\d+)", steps):
            assert eval(left) == int(right), steps


def test_without_thinking_the_calculation_is_in_the_answer() -> None:
    longer = 0
    for seed in range(200):
        text, thought, answer = sum_turn(Source(seed), thinks=True)
        again, _, said = sum_turn(Source(seed), thinks=False)
        assert (text, thought) == (again, said)
        assert said.endswith(answer)
        longer += len(said) > len(answer)
    assert longer > 80


def test_numbers_have_their_english_words() -> None:
    assert [spelled(n) for n in (0, 13, 40, 87, 300, 999)] == [
        "zero", "thirteen", "forty", "eighty-seven", "three hundred",
        "nine hundred and ninety-nine",
    ]  # fmt: skip
