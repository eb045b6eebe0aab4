"""Tokens with drafts are those without, whatever the drafts; and distributed as the target says."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from glimmer.kernels.sampling.penalties import count, penalise
from glimmer.kernels.sampling.sampling import draw_truncated, uniform
from glimmer.kernels.sampling.speculative import accept, drafts_before, kept
from torch import Tensor
from torch.nn.functional import pad

VOCAB, LENGTH = 6, 3  # 216 sequences
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * 1.2
Rules = dict[str, float]
RULES: dict[str, Rules] = {
    "temperature": {"temperature": 1.0},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "top_k": {"temperature": 0.7, "top_k": 3},
    "min_p": {"temperature": 1.3, "min_p": 0.1},
    "penalties": {
        "temperature": 1.0,
        "repetition": 1.4,
        "frequency": 0.5,
        "presence": 0.8,
        "top_p": 0.95,
    },
}
NEUTRAL: Rules = {
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "repetition": 1,
    "frequency": 0,
    "presence": 0,
}
Choose = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rightly(sampled: Tensor, drafts: Tensor, room: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    return accept(sampled, drafts, room)


def typical(sampled: Tensor, drafts: Tensor, room: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """A wrong rule that others use: a draft that is likely enough is right."""
    likely = shares[:, :-1].gather(2, drafts[..., None]).squeeze(2) > 0.25
    sampled = sampled.clone()
    sampled[:, :-1] = torch.where(likely, drafts, sampled[:, :-1])
    return accept(sampled, drafts, room)


def generate(
    rules: Rules,
    seeds: Tensor,
    num_drafts: int,
    choose: Choose = rightly,
    count_drafts: bool = True,
    guess: Callable[[Tensor], Tensor] = lambda last: TABLE[last].argmax(-1),
) -> Tensor:
    """[len(seeds), LENGTH]: what a server makes, a batch of one row per seed."""
    rows = torch.arange(len(seeds))
    columns = {k: torch.full((len(seeds),), v) for k, v in (NEUTRAL | rules).items()}
    columns["top_k"] = columns["top_k"].long()
    slots, counts = rows.int(), torch.zeros(len(seeds), VOCAB, dtype=torch.int16)
    last, num_outputs = torch.zeros(len(seeds), dtype=torch.int64), torch.zeros_like(seeds)
    outputs = torch.full((len(seeds), LENGTH + num_drafts + 1), -1)
    places = torch.arange(num_drafts + 1)
    while int(num_outputs.min()) < LENGTH:
        tokens = [last]
        for _ in range(num_drafts):
            tokens.append(guess(tokens[-1]))
        inputs = torch.stack(tokens, 1)
        drafts = inputs[:, 1:]
        of_place = rows.repeat_interleave(num_drafts + 1)
        logits = TABLE[inputs.flatten()]
        before = drafts_before(drafts) if count_drafts else None
        pushing = (columns[k] for k in ("repetition", "frequency", "presence"))
        penalise(logits, of_place, slots, counts, *pushing, drafts=before)
        noise = uniform(seeds[of_place], (num_outputs[:, None] + places).flatten())
        cutting = (columns[k] for k in ("temperature", "top_k", "top_p", "min_p"))
        sampled = draw_truncated(logits, noise, of_place, *cutting)[0].view(-1, num_drafts + 1)
        shares = logits.softmax(-1).view(len(seeds), num_drafts + 1, VOCAB)
        num_tokens, last = choose(sampled, drafts, torch.full_like(seeds, 1 << 40), shares)
        new = torch.where(places < num_tokens[:, None] - 1, pad(drafts, (0, 1)), last[:, None])
        at = (num_outputs[:, None] + places).clamp(max=outputs.shape[1] - 1)
        is_new = (places < num_tokens[:, None]) & (num_outputs[:, None] + places < LENGTH)
        outputs.scatter_(1, at, torch.where(is_new, new, outputs.gather(1, at)))
        count(of_place, kept(new, num_tokens).flatten(), slots, counts)
        num_outputs += num_tokens
    return outputs[:, :LENGTH]


def target(rules: Rules) -> list[float]:
    """Probability of each of the VOCAB ** LENGTH sequences, by the definitions."""
    r = NEUTRAL | rules

    def following(prefix: tuple[int, ...]) -> list[float]:
        logits = TABLE[prefix[-1] if prefix else 0].tolist()
        for token in set(prefix):
            x = logits[token]
            x = x / r["repetition"] if x > 0 else x * r["repetition"]
            logits[token] = x - r["frequency"] * prefix.count(token) - r["presence"]
        weights = [math.exp(x / r["temperature"]) for x in logits]
        shares = [w / sum(weights) for w in weights]
        before, found = 0.0, [0.0] * VOCAB
        for place, token in enumerate(sorted(range(VOCAB), key=lambda t: -shares[t])):
            is_in = place < (r["top_k"] or VOCAB) and before < r["top_p"]
            is_in = is_in and shares[token] >= r["min_p"] * max(shares)
            found[token] = shares[token] if is_in or not place else 0.0
            before += shares[token]
        return [share / sum(found) for share in found]

    table = []
    for sequence in itertools.product(range(VOCAB), repeat=LENGTH):
        chance = 1.0
        for place, token in enumerate(sequence):
            chance *= following(sequence[:place])[token]
        table.append(chance)
    return table


def surprise(outputs: Tensor, expected: list[float]) -> float:
    """Chi-square, in standard deviations from its mean. Rare sequences are taken together."""
    codes = (outputs * torch.tensor([VOCAB**2, VOCAB, 1])).sum(1)
    observed = codes.bincount(minlength=VOCAB**LENGTH).double()
    wanted = torch.tensor(expected, dtype=torch.float64) * len(outputs)
    if observed[wanted == 0].any():
        return math.inf  # a sequence that cannot be
    rare = wanted < 10
    observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
    wanted = torch.cat((wanted[~rare], wanted[rare].sum()[None]))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    chi_square = float(((observed - wanted) ** 2 / wanted).sum())
    return (chi_square - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", RULES)
def test_the_distribution_is_the_targets(name: str) -> None:
    outputs = generate(RULES[name], torch.arange(60_000), num_drafts=2)
    assert abs(surprise(outputs, target(RULES[name]))) < 4.5


def test_a_wrong_rule_of_acceptance_is_noticed() -> None:
    outputs = generate(RULES["top_p"], torch.arange(60_000), 2, choose=typical)
    assert surprise(outputs, target(RULES["top_p"])) > 50


def test_penalties_that_forget_the_drafts_before_are_noticed() -> None:
    outputs = generate(RULES["penalties"], torch.arange(60_000), 2, count_drafts=False)
    assert surprise(outputs, target(RULES["penalties"])) > 50


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("num_drafts", [1, 2, 4, 7])
def test_the_tokens_are_those_without_drafts(name: str, num_drafts: int) -> None:
    seeds = torch.arange(2000) * 7919
    plain = generate(RULES[name], seeds, 0)
    assert torch.equal(generate(RULES[name], seeds, num_drafts), plain)
    bad = generate(RULES[name], seeds, num_drafts, guess=lambda last: (last * 5 + 1) % VOCAB)
    assert torch.equal(bad, plain)


def test_accepted_are_the_drafts_up_to_the_first_wrong_one() -> None:
    drafts = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6, 7], [1, 1, 1]])
    sampled = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 8], [0, 6, 7, 8], [5, 0, 7, 8], [1, 1, 1, 1]])
    num_tokens, last = accept(sampled, drafts, torch.full((5,), 99))
    assert num_tokens.tolist() == [4, 3, 1, 2, 4]
    assert last.tolist() == [8, 0, 0, 0, 1]
    assert kept(sampled, num_tokens).tolist()[1:4] == [
        [5, 6, 0, -1],
        [0, -1, -1, -1],
        [5, 0, -1, -1],
    ]


def test_a_row_never_passes_its_pages() -> None:
    sampled, drafts = torch.tensor([[5, 6, 7, 8]] * 4), torch.tensor([[5, 6, 7]] * 4)
    num_tokens, last = accept(sampled, drafts, torch.tensor([0, 1, 3, 4]))
    assert num_tokens.tolist() == [1, 1, 3, 4]
    assert last.tolist() == [5, 5, 7, 8]


def test_no_drafts_is_plain_decoding() -> None:
    sampled, none = torch.tensor([[3], [4]]), torch.empty(2, 0, dtype=torch.int64)
    num_tokens, last = accept(sampled, none, torch.tensor([5, 0]))
    assert (num_tokens.tolist(), last.tolist()) == ([1, 1], [3, 4])
    assert drafts_before(none).shape == (2, 0)


def test_each_place_counts_the_drafts_before_it() -> None:
    before = drafts_before(torch.tensor([[5, 6], [7, 8]]))
    assert before.tolist() == [[-1, -1], [5, -1], [5, 6], [-1, -1], [7, -1], [7, 8]]


@pytest.mark.gpu
def test_a_graph_accepts_what_the_cpu_does() -> None:
    drafts, sampled = torch.randint(2, (64, 3)), torch.randint(2, (64, 4))
    room = torch.randint(5, (64,))
    on_card = [x.cuda() for x in (sampled, drafts, room)]
    accept(*on_card)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        num_tokens, last = accept(*on_card)
        ids, before = kept(on_card[0], num_tokens), drafts_before(on_card[1])
    graph.replay()
    wanted, wanted_last = accept(sampled, drafts, room)
    assert torch.equal(num_tokens.cpu(), wanted)
    assert torch.equal(last.cpu(), wanted_last)
    assert torch.equal(ids.cpu(), kept(sampled, wanted))
    assert torch.equal(before.cpu(), drafts_before(drafts))


def test_the_example_of_the_docstring() -> None:
    sampled, drafts = torch.tensor([[5, 7, 9]]), torch.tensor([[5, 8]])
    num_tokens, last = accept(sampled, drafts, torch.tensor([9]))
    assert (num_tokens.tolist(), last.tolist()) == ([2], [7])
    assert kept(sampled, num_tokens).tolist() == [[5, 7, -1]]
