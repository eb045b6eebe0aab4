import json

import pytest
from glimmer.deploy.demo.training import questions
from glimmer.deploy.demo.training.questions import QUESTIONS
from glimmer.deploy.demo.training.words import Source


@pytest.mark.parametrize("maker", [maker for maker, _ in QUESTIONS])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_question_has_a_thought_and_an_answer(maker: object, held_out: bool) -> None:
    assert callable(maker)
    for seed in range(30 if maker is questions.retrieval else 200):  # those texts are long
        turn = maker(Source(seed, held_out))
        assert all(text.strip() for text in (turn.user, turn.thought, turn.answer))
        assert not any(mark in turn.user + turn.thought for mark in ("{}", "{0}", "{1}", "<|"))


def test_sums_are_right() -> None:
    for seed in range(200):
        turn = questions.arithmetic(Source(seed))
        if "larger" not in turn.answer:
            task, value = turn.answer.rstrip(".").split(" = ")
            assert eval(task) == int(value)


def test_json_answers_are_json_and_hold_what_was_asked() -> None:
    for seed in range(100):
        turn = questions.json_answer(Source(seed))
        value = json.loads(turn.answer)
        parts = value if isinstance(value, list) else [*value, *map(str, value.values())]
        assert all(part in turn.user for part in parts)


def test_what_is_looked_for_stands_once_in_the_given_part() -> None:
    for seed in range(30):
        turn = questions.retrieval(Source(seed), 300, 0.1)
        text = turn.user + turn.system
        assert text.count(turn.answer) == 1
        assert len((turn.system or turn.user).split()) > 250
        assert text.index(turn.answer) < 0.25 * len(text)
