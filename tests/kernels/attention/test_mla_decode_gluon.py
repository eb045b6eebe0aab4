"""The Gluon decode kernel on a Hopper card against the reference."""

from typing import Any

import pytest
import torch
from glimmer.kernels.attention.mla_decode_gluon import fits, launch_mla_decode_gluon
from glimmer.kernels.attention.mla_decode_split import plan_splits
from glimmer.tests.kernels.attention.test_mla_decode_triton import check, make, with_lengths

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper card")]
BOUND = 202752


def full(counts: list[int], lengths: list[int], page: int = 64) -> dict[str, Any]:
    return make(counts, lengths, 20, 512, 64, page)


def run(case: dict[str, Any], bound: int = BOUND) -> torch.Tensor:
    assert fits(case["queries"], case["kv"], case["value_dim"])
    rows = case["rows"]
    plan = plan_splits(len(rows.lengths), rows.max_query_len, 20, bound, 132)
    return launch_mla_decode_gluon(**case, plan=plan)


@pytest.mark.parametrize("bound", [0, BOUND])
@pytest.mark.parametrize(
    ("counts", "lengths"),
    [
        ([1], [1]),
        ([1], [70001]),
        ([1] * 33, [1 + 97 * i for i in range(33)]),
        ([1] * 200, [1 + 13 * i for i in range(200)]),
        ([1] * 600, [1 + i for i in range(600)]),
        ([4] * 5, [4, 65, 1000, 3001, 64]),
        ([8, 3, 1], [900, 3, 20000]),
        ([500, 17], [3000, 8000]),
    ],
)
def test_matches_the_reference(counts: list[int], lengths: list[int], bound: int) -> None:
    bound = max(bound, *lengths)
    check(full(counts, lengths), bound, run)
    if len(lengths) < 100:
        check(full(counts, lengths, 128), bound, run)


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_queries(count: int) -> None:
    lengths = [count, 63 + count, 64, 65, 127, 1000, 4097]
    check(full([count] * 7, lengths), BOUND, run)


@pytest.mark.parametrize("num_rows", [1, 2, 32, 160])
def test_a_row_does_not_see_the_others(num_rows: int) -> None:
    case = full([1] * num_rows, [3000, *range(65, 64 + num_rows)])
    other = with_lengths(case, [3000, *[1] * (num_rows - 1)])
    assert torch.equal(run(case)[0], run(other)[0])


def test_a_graph_follows_the_lengths() -> None:
    case = full([1] * 5, [3000, 700, 64, 65, 1])
    expected = []
    settings = [[3000, 700, 64, 65, 1], [1, 2, 3, 4, 1], [2999, 1, 64, 33, 1]]
    for lengths in settings:
        expected.append(run(with_lengths(case, lengths)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(case)
    for lengths, right in zip(settings, expected, strict=True):
        case["rows"].lengths.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(found, right)
