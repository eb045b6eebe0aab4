"""What a step needs follows from the rows that are in it."""

import torch
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.sampling.rules import Biases, Boost, Choice, RowRules

VOCAB = 20


def make_rules(**rows: SamplingParams) -> RowRules:
    rules = RowRules(8, VOCAB, torch.device("cpu"))
    for name, params in rows.items():
        rules.admit(int(name[1:]), params, [])
    return rules


def test_the_least_choice_that_serves_all() -> None:
    rules = make_rules(
        r0=SamplingParams(9),
        r1=SamplingParams(9, temperature=1.0),
        r2=SamplingParams(9, temperature=1.0, min_p=0.1),
        r3=SamplingParams(9, top_k=3),
    )
    assert rules.choice([0, 3]) is Choice.GREEDY
    assert rules.choice([0, 1]) is Choice.DRAW
    assert rules.choice([1, 2]) is Choice.TRUNCATED
    rules.free(2)
    assert rules.choice([0, 1, 2, 3]) is Choice.DRAW
    rules.admit(1, SamplingParams(9), [])
    assert rules.choice([0, 1]) is Choice.GREEDY


def test_rows_that_touch_logits() -> None:
    stops = (7, VOCAB)
    rules = make_rules(
        r0=SamplingParams(9, temperature=1.0, top_p=0.5, stop_token_ids=stops, num_logprobs=3),
        r1=SamplingParams(9, presence_penalty=1.0),
        r2=SamplingParams(9, stop_token_ids=stops, min_new_tokens=4),
        r3=SamplingParams(9, stop_token_ids=stops, decay_factor=1.1, decay_start=5),
        r4=SamplingParams(9, allowed_token_ids=(3, 4)),
        r5=SamplingParams(9, logit_bias=((3, 1.0), (VOCAB, 9.0), (3, 2.0), (4, -100.0))),
        r6=SamplingParams(9, decay_factor=1.1, min_new_tokens=4),  # no stop tokens
    )
    assert [rules.touch_logits([row]) for row in range(7)] == [False, *[True] * 5, False]
    assert rules.logprobs == {0: 3}
    assert rules.boosts == {3: Boost((7,), 5, 1.1)}
    assert rules.biases[2] == Biases((7,), (0.0,), (4,))
    assert rules.biases[5] == Biases((3, 4), (3.0, -torch.inf), (0, 0))
    assert rules.allowed[4].nonzero().flatten().tolist() == [3, 4]
    for row in range(7):
        rules.free(row)
    assert not rules.touch_logits(range(8))
