"""The search of the cut against the sorting reference: which tokens stay, and what is drawn."""

from collections.abc import Sequence

import pytest
import torch
from glimmer.kernels.sampling import sampling
from glimmer.kernels.sampling.cut_triton import ROUNDS, find_cut
from glimmer.kernels.sampling.sampling import uniform
from glimmer.kernels.sampling.sampling_triton import pick, scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(
    logits: torch.Tensor,
    noise: torch.Tensor,
    rows: torch.Tensor,
    columns: list[torch.Tensor],
    chunk: int,
    num_rounds: int = ROUNDS,
) -> torch.Tensor:
    """columns: temperature, top_k, top_p, min_p."""
    logits, noise, rows, *columns = (x.to(DEVICE) for x in (logits, noise, rows, *columns))
    scanned = scan(logits, rows, columns[0], chunk)
    cut, sums = find_cut(scanned, rows, *columns, num_rounds)
    return pick(scanned, noise, rows, columns[0], cut, sums)[0].cpu()


def kept_ids(
    logits: torch.Tensor, rules: Sequence[dict[str, float]], num_rounds: int
) -> list[list[int]]:
    """What each of the rules leaves of one row of logits."""
    defaults: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    columns = [
        torch.tensor([r.get(name, value) for r in rules]) for name, value in defaults.items()
    ]
    temperature, top_k, top_p, min_p = (column.to(DEVICE) for column in columns)
    rows = torch.arange(len(rules), device=DEVICE)
    scanned = scan(logits.to(DEVICE).expand(len(rules), -1), rows, temperature, 8)
    cut, _ = find_cut(scanned, rows, temperature, top_k, top_p, min_p, num_rounds)
    low, tie = cut.values.cpu()[:, :1], cut.values.cpu()[:, 1:]
    equal = logits == tie
    kept = (logits > low) | (equal & (equal.cumsum(-1) <= cut.kept_ties.cpu()[:, None]))
    kept &= (logits - logits.max()).exp() >= columns[3][:, None]
    return [row.nonzero().flatten().tolist() for row in kept]


EXAMPLES: list[tuple[dict[str, float], list[int]]] = [
    ({"top_k": 1}, [6]),
    ({"top_k": 3}, [0, 3, 6]),  # of four equal ones the first two
    ({"top_k": 11}, [0, 1, 3, 6, 9, 11]),
    ({"top_p": 1e-9}, [6]),
    ({"top_p": 0.0}, [6]),
    ({"min_p": 1.0}, [6]),
    ({"min_p": 0.4}, [0, 3, 6, 9, 11]),
    ({"top_k": 4, "min_p": 0.4}, [0, 3, 6, 9]),
    ({"top_k": 4, "top_p": 0.6}, [0, 3, 6]),  # before the third: 2.2 < 2.7, the fourth: 2.9
    ({"top_k": 2, "top_p": 0.99}, [0, 6]),
]


@pytest.mark.parametrize("num_rounds", [0, 3])  # 0: bisection alone
def test_what_stays(num_rounds: int) -> None:
    weights = torch.zeros(12)
    weights[[6, 0, 3, 9, 11, 1]] = torch.tensor([1.5, 0.7, 0.7, 0.7, 0.7, 0.2])
    rules, kept = zip(*EXAMPLES, strict=True)
    assert kept_ids(weights.log(), rules, num_rounds) == list(kept)


def test_the_example_of_the_docstring() -> None:
    logits = torch.tensor([9.0, 7.0, 5.0, 5.0, 1.0])
    assert kept_ids(logits, [{"top_k": 3}], num_rounds=2) == [[0, 1, 2]]


@pytest.mark.parametrize("num_rounds", [0, 2])
def test_equal_tokens_and_numbers_that_crowd(num_rounds: int) -> None:
    rules = ({"top_k": 5}, {"top_p": 0.41})
    step = torch.finfo(torch.float32).eps
    for logits in (
        torch.zeros(12),
        1 + step * torch.arange(12.0),
        torch.tensor(10.0) ** -torch.arange(30, 42),  # denormal in the end
    ):
        first = logits.sort(descending=True, stable=True).indices[:5].sort().values.tolist()
        assert kept_ids(logits, rules, num_rounds) == [first] * 2
    alone = torch.full((12,), -torch.inf)
    alone[7] = -3
    assert kept_ids(alone, rules, num_rounds) == [[7]] * 2


def random_columns(count: int) -> list[torch.Tensor]:
    some = torch.rand(4, count) < 0.4
    return [
        torch.where(some[0], 1.0, torch.rand(count) * 2 + 0.1).where(torch.rand(count) > 0.1, 0.0),
        torch.where(some[1], 0, torch.randint(1, 200, (count,))),
        torch.where(some[2], 1.0, torch.rand(count)),
        torch.where(some[3], 0.0, torch.rand(count) * 0.2),
    ]


@pytest.mark.parametrize(
    ("num_rows", "width", "chunk"),
    [
        (6, 200, 64),
        *(pytest.param(n, 154_856, 4096, marks=pytest.mark.gpu) for n in (1, 2, 7, 256)),
    ],
)
def test_draws(num_rows: int, width: int, chunk: int) -> None:
    """Every other row has many equal logits."""
    logits = torch.randn(num_rows, width) * 4
    logits[::2] = logits[::2].bfloat16().float()
    columns = random_columns(num_rows)
    rows = torch.randperm(num_rows)
    noise = uniform(rows, rows + 7)
    drawn = draw(logits, noise, rows, columns, chunk)
    expected = sampling.draw_truncated_reference(logits, noise, rows, *columns)[0]
    assert (drawn != expected).sum() <= num_rows // 50  # noise on a border, or the cut


def test_rows_that_nothing_cuts_draw_as_if_alone() -> None:
    logits = (torch.randn(6, 200) * 2).to(DEVICE)
    rows = torch.arange(6, device=DEVICE)
    noise = uniform(rows, rows)
    temperature = torch.full((6,), 1.5, device=DEVICE)
    none = [temperature, torch.tensor([0, 0, 0, 200, 4, 0]), torch.ones(6), torch.zeros(6)]
    plain = pick(scan(logits, rows, temperature, 64), noise, rows, temperature)[0].tolist()
    drawn = draw(logits, noise, rows, none, 64).tolist()
    assert drawn[:4] + drawn[5:] == plain[:4] + plain[5:]
