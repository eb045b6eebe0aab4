"""The rules that a step needs follow from its rows."""

import torch
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.sampling.rules import Biases, Boost, PenaltyCounts, RowRules, SamplingMode

VOCAB = 20


def make_rules(**rows: SamplingParams) -> RowRules:
    rules = RowRules(8, VOCAB, torch.device("cpu"))
    for name, params in rows.items():
        rules.admit(int(name[1:]), params, [])
    return rules


def test_the_least_mode_that_serves_all() -> None:
    rules = make_rules(
        r0=SamplingParams(9),
        r1=SamplingParams(9, temperature=1.0),
        r2=SamplingParams(9, temperature=1.0, min_p=0.1),
        r3=SamplingParams(9, top_k=3),
    )
    assert rules.mode([0, 3]) is SamplingMode.GREEDY
    assert rules.mode([0, 1]) is SamplingMode.DRAW
    assert rules.mode([1, 2]) is SamplingMode.TRUNCATED
    rules.free(2)
    assert rules.mode([0, 1, 2, 3]) is SamplingMode.DRAW
    rules.admit(1, SamplingParams(9), [])
    assert rules.mode([0, 1]) is SamplingMode.GREEDY


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


def test_slots_are_taken_given_back_and_never_mixed_up() -> None:
    counts = PenaltyCounts(40, 11, "cpu")
    for row in range(30):
        counts.admit(row, [row % 11] * (row + 1))
    assert [counts.of(row).sum() for row in range(30)] == list(range(1, 31))
    for row in range(0, 30, 2):
        counts.free(row)
        counts.free(row)
    assert not counts.concerns(range(0, 40, 2))
    assert counts.concerns([0, 1])
    counts.admit(35, [])
    counts.admit(1, [3])
    assert counts.of(35).sum() == 0
    assert counts.of(1)[:11].tolist() == [0, 0, 0, 1, *[0] * 7]
    assert [counts.of(row).sum() for row in range(3, 30, 2)] == list(range(4, 31, 2))
    assert (counts.slots >= 0).nonzero().flatten().tolist() == [*range(1, 30, 2), 35]


def test_recorded_tokens_count_where_there_is_a_slot() -> None:
    counts = PenaltyCounts(4, 8, "cpu")
    counts.record([0], torch.tensor([0]), torch.tensor([5]))
    counts.admit(2, [])
    counts.record([1, 2], torch.tensor([1, 2, 2, 2]), torch.tensor([5, 6, 6, -1]))
    assert counts.of(2).tolist() == [0, 0, 0, 0, 0, 0, 2, 0]


def test_counts_of_admission_end_where_all_counting_does() -> None:
    counts = PenaltyCounts(1, 4, "cpu")
    counts.admit(0, [1] * 70_000 + [2])
    assert counts.of(0).tolist() == [0, 32_000, 1, 0]
