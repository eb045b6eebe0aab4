"""Which token a row gets depends on its own parameters, seed and output position alone."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from glimmer.shared.messages import RowAdmit, StepPlan, TokenLogprob
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.inputs import SamplingPoints
from glimmer.workers.rows import RowTable
from glimmer.workers.sampling import sampler
from glimmer.workers.sampling.logprobs import token_logprobs

VOCAB, IDS = 40, 36  # the last four rows are padding
STOPS = (7, 9)


def make_table(
    params: list[SamplingParams],
    outputs: list[int] | None = None,
    counted: list[list[int]] | None = None,
    device: str = "cpu",
) -> RowTable:
    table = RowTable(max(8, len(params)), 4, 16, VOCAB, device)
    admitted = [
        RowAdmit(row, p, [], 0, outputs[row] if outputs else 0, counted[row] if counted else [])
        for row, p in enumerate(params)
    ]
    table.apply(StepPlan(0, 0, [], admitted, [], [], []))
    return table


def next_points(table: RowTable, rows: Sequence[int]) -> SamplingPoints:
    """The next output of each row."""
    index = torch.tensor(rows, device=table.device)
    return SamplingPoints(index, table.num_outputs[index])


def record(table: RowTable, rows: Sequence[int], ids: torch.Tensor) -> None:
    """These tokens were sampled."""
    index = torch.tensor(rows, device=table.device)
    table.advance(index, table.ones[:, : len(rows)])
    table.rules.penalties.record(rows, index, ids)
    table.count(StepPlan(0, 0, [], [], [], [], list(rows)))


def sample(
    raw: torch.Tensor, rows: Sequence[int], table: RowTable, num_token_ids: int, **options: Any
) -> tuple[torch.Tensor, list[list[TokenLogprob]]]:
    """(ids, log-probabilities), read at once."""
    options.setdefault("points", next_points(table, rows))
    sampled = sampler.sample(raw, rows, table=table, num_token_ids=num_token_ids, **options)
    ids, found = sampled.read(sampled.tensors())
    return torch.tensor(ids), found


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 99, **values})


def one(logits: torch.Tensor, num_outputs: int = 0, counted: Any = (), **values: Any) -> int:
    table = make_table([params(**values)], [num_outputs], [list(counted)])
    ids, _ = sample(logits[None].clone(), [0], table, IDS)
    return int(ids[0])


def many(logits: torch.Tensor, count: int = 4000, **values: Any) -> list[float]:
    """Share of each id over seeds."""
    table = make_table([params(seed=seed, **values) for seed in range(count)])
    ids, _ = sample(logits.expand(count, -1).clone(), range(count), table, IDS)
    return (ids.bincount(minlength=VOCAB) / count).tolist()


@pytest.fixture
def logits() -> torch.Tensor:
    """5 > 7 (a stop id) > 3 > the rest; padding rows are largest of all."""
    values = torch.zeros(VOCAB)
    values[[5, 7, 3]] = torch.tensor([3.0, 2.0, 1.0])
    values[IDS:] = 50.0
    return values


def test_greedy_takes_the_largest_but_never_padding(logits: torch.Tensor) -> None:
    assert one(logits) == 5
    assert one(logits, top_k=2, top_p=0.1, min_p=0.9) == 5
    assert max(i for i, share in enumerate(many(logits, temperature=5.0)) if share) < IDS


def test_temperature_flattens(logits: torch.Tensor) -> None:
    for temperature in (0.5, 1.0, 3.0):
        expected = (logits[:IDS] / temperature).softmax(0)
        got = torch.tensor(many(logits, temperature=temperature)[:IDS])
        assert (got - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)


def test_truncation_limits_what_can_come(logits: torch.Tensor) -> None:
    def seen(**values: Any) -> set[int]:
        return {i for i, share in enumerate(many(logits, temperature=2.0, **values)) if share}

    assert len(seen()) > 20
    assert seen(top_k=3) == {5, 7, 3}
    assert seen(top_k=1) == {5}
    assert seen(top_p=0.1) == {5}  # it has 0.107
    assert seen(top_p=0.15) == {5, 7}
    assert seen(min_p=0.3) == {5, 7, 3}


def test_penalties_push_produced_tokens_down(logits: torch.Tensor) -> None:
    assert one(logits, counted=[5], presence_penalty=1.5) == 7
    assert one(logits, counted=[5], frequency_penalty=0.4) == 5
    assert one(logits, counted=[5, 5, 5], frequency_penalty=0.4) == 7
    assert one(logits, counted=[5], repetition_penalty=2.0) == 7
    assert one(-logits - 50 * (logits > 40), counted=range(8, IDS), repetition_penalty=1.5) in (
        {0, 1, 2, 4, 6}
    )
    assert one(logits, counted=[5, 5, 5]) == 5


def test_stop_ids_wait_for_min_new_tokens(logits: torch.Tensor) -> None:
    logits[5] = 0
    values = {"stop_token_ids": STOPS, "min_new_tokens": 3}
    assert one(logits, num_outputs=2, **values) == 3
    assert one(logits, num_outputs=3, **values) == 7


def test_length_penalty_raises_stop_ids_with_length(logits: torch.Tensor) -> None:
    values = {"stop_token_ids": STOPS, "decay_start": 4, "decay_factor": 1.5}
    assert one(logits, num_outputs=4, **values) == 5
    assert one(logits, num_outputs=5, **values) == 5  # 2 + 2 * 0.5 = 3: the first of equals
    assert one(logits, num_outputs=6, **values) == 7
    assert one(logits, num_outputs=100_000, **values) == 7  # 1.5**99996 overflows a float


def test_bias_bans_and_allow_lists(logits: torch.Tensor) -> None:
    assert one(logits, logit_bias=((12, 3.5),)) == 12
    assert one(logits, logit_bias=((5, -1.5),)) == 7
    assert one(logits, logit_bias=((5, -100.0), (7, -150.0))) == 3
    assert one(logits, allowed_token_ids=(3, 20)) == 3
    assert one(logits, allowed_token_ids=(3, 20), logit_bias=((20, 2.0),)) == 20
    shares = many(logits, temperature=9.0, allowed_token_ids=(3, 20))
    assert {i for i, share in enumerate(shares) if share} == {3, 20}


def test_rules_that_forbid_everything_are_void(logits: torch.Tensor) -> None:
    assert one(logits, allowed_token_ids=(3,), logit_bias=((3, -100.0),)) == 5
    assert one(logits, allowed_token_ids=(7,), stop_token_ids=(7,), min_new_tokens=1) == 5
    assert one(logits, allowed_token_ids=(IDS,)) == 5  # padding alone is nothing


MIXED = (
    params(temperature=1.0, seed=1),
    params(temperature=0.7, top_p=0.8, seed=2),
    params(temperature=1.3, top_k=5, min_p=0.01, seed=3),
    params(),
    params(temperature=1.0, presence_penalty=0.7, frequency_penalty=0.2, seed=5),
    params(temperature=1.0, logit_bias=((3, 2.0),), seed=6),
    params(temperature=1.0, seed=7, stop_token_ids=STOPS, min_new_tokens=9, num_logprobs=2),
    params(temperature=1.0, top_p=0.9, seed=8, allowed_token_ids=(1, 2, 3), num_logprobs=0),
)
COUNTED = [[1, 1, 2]] * len(MIXED)


def test_neither_batch_position_nor_neighbours_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        raw = torch.randn(len(MIXED), VOCAB, generator=generator) * 3
        outputs = [trial * 3 + i for i in range(len(MIXED))]
        table = make_table(list(MIXED), outputs, COUNTED)
        together, found = sample(raw.clone(), range(len(MIXED)), table, IDS)
        for row in range(len(MIXED)):
            alone, own = sample(raw[row : row + 1].clone(), [row], table, IDS)
            assert alone.tolist() == [together[row]]
            assert own[0] == found[row]
        order = torch.randperm(len(MIXED), generator=generator).tolist()
        shuffled, _ = sample(raw[order], order, table, IDS)
        assert shuffled.tolist() == together[order].tolist()


def test_seed_and_position_decide_and_differ() -> None:
    flat = torch.zeros(VOCAB)
    run = [one(flat, num_outputs=i, temperature=1.0, seed=4) for i in range(30)]
    assert run == [one(flat, num_outputs=i, temperature=1.0, seed=4) for i in range(30)]
    assert len(set(run)) > 15
    assert run != [one(flat, num_outputs=i, temperature=1.0, seed=5) for i in range(30)]
    one(flat, temperature=1.0, seed=2**63 - 1)
    one(flat, temperature=1.0, seed=2**64 - 1)


def test_logprobs_are_after_penalties_and_temperature_but_before_truncation(
    logits: torch.Tensor,
) -> None:
    p = params(temperature=0.5, top_k=1, presence_penalty=1.5, num_logprobs=3)
    ids, found = sample(logits[None].clone(), [0], make_table([p], [1], [[5]]), IDS)
    expected = logits[:IDS].clone()
    expected[5] -= 1.5
    table = (expected / 0.5).log_softmax(0)
    assert ids.tolist() == [7]
    entry = found[0][0]
    assert (entry.token_id, entry.rank) == (7, 1)
    assert entry.logprob == pytest.approx(table[7].item(), abs=1e-5)
    assert [i for i, _ in entry.top] == [7, 5, 3]
    assert [v for _, v in entry.top] == pytest.approx(table[[7, 5, 3]].tolist(), abs=1e-5)


def test_logprobs_only_for_rows_that_ask(logits: torch.Tensor) -> None:
    asked = [params(num_logprobs=0), params(), params(num_logprobs=99)]
    _, found = sample(logits.expand(3, -1).clone(), [0, 1, 2], make_table(asked), IDS)
    assert [len(entries) for entries in found] == [1, 0, 1]
    assert found[0][0].top == []
    assert len(found[2][0].top) == IDS


def test_banned_tokens_report_the_least_logprob(logits: torch.Tensor) -> None:
    p = params(num_logprobs=IDS, logit_bias=((5, -100.0),))
    _, found = sample(logits[None].clone(), [0], make_table([p]), IDS)
    assert found[0][0].top[-1] == (5, -9999.0)
    chosen = token_logprobs(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]), [0])[0]
    assert (chosen.logprob, chosen.rank) == (-9999.0, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_logits_name_their_row(bad: float) -> None:
    table = make_table([params(), params(temperature=1.0), params()])
    raw = torch.zeros(3, VOCAB)
    raw[1, 3] = bad
    with pytest.raises(FloatingPointError, match=r"row 1 .* \(1 rows are bad\)"):
        sample(raw, [0, 1, 2], table, IDS)
    assert sample(raw[[0, 2]], [0, 2], table, IDS)[0].tolist() == [0, 0]


@pytest.mark.parametrize("rule", [{"logit_bias": ((3, -100.0),)}, {"presence_penalty": 1.0}])
def test_rules_do_not_hide_numbers_that_are_not_finite(rule: Any) -> None:
    raw = torch.zeros(1, VOCAB)
    raw[0, 3] = math.nan
    with pytest.raises(FloatingPointError, match="row 0 "):
        sample(raw, [0], make_table([params(allowed_token_ids=(5,), **rule)]), IDS)


def test_drafts_are_sampled_as_if_they_had_come_one_by_one() -> None:
    """Verifying: the logits after each draft in one batch, before any of them is recorded."""
    p = params(
        temperature=1.3, seed=11, presence_penalty=1.0, frequency_penalty=0.5, top_p=0.9,
        stop_token_ids=STOPS, min_new_tokens=3, logit_bias=((2, 1.0),), decay_start=2,
        decay_factor=1.2, num_logprobs=2,
    )  # fmt: skip
    raw = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    table = make_table([p, p], [1, 1], [[4], [4]])
    one_by_one, found = [], []
    for at in range(4):
        ids, entries = sample(raw[at : at + 1].clone(), [0], table, IDS)
        record(table, [0], ids)
        one_by_one += ids.tolist()
        found += entries
    drafts = torch.full((4, 3), -1)
    for at in range(1, 4):
        drafts[at, :at] = torch.tensor(one_by_one[:at])
    points = SamplingPoints(torch.full((4,), 1), 1 + torch.arange(4), drafts)
    together = sample(raw.clone(), [1] * 4, table, IDS, points=points)
    assert together[0].tolist() == one_by_one
    assert together[1] == found


def test_grammar_masks_beside_allow_lists_and_free_rows() -> None:
    raw = torch.zeros(3, VOCAB)
    raw[:, 5], raw[:, 7] = 9.0, 8.0
    table = make_table([params(logit_bias=((7, -100.0),)), params(), params()])
    legal = torch.zeros(2, 2, dtype=torch.int32)
    legal[0, 0] = 1 << 7  # banned by row 0, which leaves nothing: the ban is void
    legal[1, 1] = 1 << 2  # 34
    assert sample(raw, [2, 0, 1], table, IDS, masks=([1, 2], legal))[0].tolist() == [5, 7, 34]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_gpu_chooses_as_the_cpu_does_and_the_host_does_not_wait() -> None:
    every = [*MIXED, params(stop_token_ids=STOPS, decay_factor=1.2, num_logprobs=4)]
    every.append(params(thinking_budget=len(every), thinking_end_id=IDS - 1, temperature=0.5))
    outputs = list(range(len(every)))
    raw = torch.randn(len(every), VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    legal = torch.full((2, 2), 0x0F0F0F0F, dtype=torch.int32)
    answers = []
    for device in ("cpu", "cuda"):
        table = make_table(every, outputs, [[1, 1, 2]] * len(every), device)
        for _ in range(2):  # the first time kernels are compiled
            logits = raw.to(device, copy=True)  # rules change them
            index = torch.tensor(outputs, device=device)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                points = SamplingPoints(index, table.num_outputs[index])
                sampled = sampler.sample(logits, outputs, points, table, IDS, ([3, 7], legal))
                table.advance(index, table.ones[:, : len(outputs)])
                table.rules.penalties.record(outputs, index, sampled.ids)
                table.rules.thinking.record(index, sampled.ids)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        answers.append(sampled.read([x.cpu() for x in sampled.tensors()]))
    assert answers[0][0] == answers[1][0]
    for one, other in zip(answers[0][1], answers[1][1], strict=True):
        assert [(e.token_id, e.rank) for e in one] == [(e.token_id, e.rank) for e in other]
        assert [e.logprob for e in one] == pytest.approx([e.logprob for e in other], abs=1e-5)
