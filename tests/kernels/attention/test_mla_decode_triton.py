"""The Triton decode kernels against the reference: any cut of any rows gives the same."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from glimmer.kernels.attention import mla_decode_split
from glimmer.kernels.attention.mla_decode import mla_decode
from glimmer.kernels.attention.mla_decode_split import plan_splits
from glimmer.kernels.attention.mla_decode_triton import launch_mla_decode
from glimmer.kernels.attention.mla_projections import expand_values
from glimmer.kernels.attention.paged_rows import PagedRows

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32  # the interpreter cuts bfloat16 off
TOLERANCE = 2e-2 if CUDA else 1e-5
SMS = 8


def make(
    counts: list[int], lengths: list[int], heads: int, value: int, rope: int, page: int
) -> dict[str, Any]:
    """Rows in shuffled pages of one layer of two; what must not be seen is NaN."""
    pages = [-(-length // page) for length in lengths]
    kv = torch.full((sum(pages) + 1, 2, page, value + rope), torch.nan)[:, 1]
    order = torch.randperm(len(kv))
    table = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32)
    used = 0
    for row, (num, length) in enumerate(zip(pages, lengths, strict=True)):
        row_pages = order[used : used + num]
        table[row, :num] = row_pages
        used += num
        latents = kv[row_pages].flatten(0, 1)
        latents[:length] = torch.randn(length, value + rope)
        kv[row_pages] = latents.view(num, page, -1)
    starts = torch.tensor([0, *counts]).cumsum(0)
    return {
        "queries": torch.randn(sum(counts), heads, value + rope).to(DEVICE, DTYPE),
        "kv": kv.to(DEVICE, DTYPE),
        "rows": PagedRows(
            page_table=table.to(DEVICE),
            query_starts=starts.to(DEVICE),
            lengths=torch.tensor(lengths, device=DEVICE),
            max_query_len=max(counts),
            max_length=max(lengths),
        ),
        "value_dim": value,
        "scale": 0.2,
    }


def with_lengths(case: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    rows = dataclasses.replace(case["rows"], lengths=torch.tensor(lengths, device=DEVICE))
    return {**case, "rows": rows}


def run(
    case: dict[str, Any], bound: int, w_uv: torch.Tensor | None = None, **changes: Any
) -> torch.Tensor:
    heads = case["queries"].shape[1]
    rows = case["rows"]
    plan = plan_splits(len(rows.lengths), rows.max_query_len, heads, bound, SMS)
    return launch_mla_decode(**case, plan=dataclasses.replace(plan, **changes), w_uv=w_uv)


def check(
    case: dict[str, Any], bound: int, kernel: Callable[..., torch.Tensor] = run, **changes: Any
) -> None:
    got = kernel(case, bound, **changes)
    clean = {**case, "kv": case["kv"].nan_to_num(0.0).float(), "queries": case["queries"].float()}
    expected = mla_decode(**clean)
    assert got.dtype == case["queries"].dtype
    torch.testing.assert_close(got.float(), expected, atol=TOLERANCE, rtol=TOLERANCE)


CASES = [  # queries of each row, lengths, heads, value and rope width, page size
    ([1, 1, 1, 1], [1, 63, 64, 200], 3, 16, 8, 64),
    ([1, 1], [700, 65], 5, 24, 16, 16),
    ([3, 1, 4], [3, 150, 70], 5, 48, 16, 16),
    ([5, 1], [100, 66], 13, 16, 8, 128),  # one column more than a block
]


@pytest.mark.parametrize(
    ("case", "bound"), [(CASES[0], 0), (CASES[0], 5000), *zip(CASES[1:], (0, 5000, 0), strict=True)]
)
def test_matches_the_reference(case: tuple[Any, ...], bound: int) -> None:
    check(make(*case), max(bound, *case[1]))


def test_no_rows() -> None:
    case = make([1], [1], 2, 16, 8, 64)
    rows = case["rows"]
    none = PagedRows(rows.page_table[:0], rows.query_starts[:1], rows.lengths[:0], 1, 1)
    assert run({**case, "queries": case["queries"][:0], "rows": none}, 64).shape == (0, 2, 16)


@pytest.mark.parametrize("chunks", [1, 3, 100])
def test_any_number_of_chunks(chunks: int) -> None:
    case = make([1, 1], [390, 130], 3, 16, 8, 64)
    check(case, 390, least_chunks=chunks, most_chunks=chunks)


def test_a_row_does_not_see_the_others() -> None:
    case = make([1, 1, 1], [300, 65, 129], 3, 16, 8, 64)
    assert torch.equal(run(case, 300)[0], run(with_lengths(case, [300, 1, 2]), 4000)[0])


@pytest.mark.parametrize("lengths", [[1], [300], [70, 5]])
@pytest.mark.parametrize("most_chunks", [1, 4])
def test_values_come_up_projected(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], most_chunks: int
) -> None:
    monkeypatch.setattr(mla_decode_split, "FUSED_TOKENS", 2)
    case = make([1] * len(lengths), lengths, 3, 24, 8, 16)
    kv_b = torch.randn(3, 50, 24, device=DEVICE).to(DTYPE)
    w_uv = kv_b[:, 10:]
    got = run(case, 300, w_uv, most_chunks=most_chunks, least_chunks=most_chunks)
    apart = expand_values(run(case, 300, most_chunks=1, least_chunks=1), w_uv)
    torch.testing.assert_close(got, apart, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [0, 202752])
@pytest.mark.parametrize(
    ("counts", "lengths"),
    [
        ([1], [1]),
        ([1], [70001]),
        ([1] * 33, [1 + 97 * i for i in range(33)]),
        ([1] * 200, [1 + 13 * i for i in range(200)]),
        ([4] * 5, [4, 65, 1000, 3001, 64]),
        ([8, 3, 1], [900, 3, 20000]),
        ([500, 17], [3000, 8000]),
    ],
)
def test_full_size_on_the_card(counts: list[int], lengths: list[int], bound: int) -> None:
    check(make(counts, lengths, 20, 512, 64, 64), max(bound, *lengths))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "value", "rope", "page"), [(5, 48, 16, 16), (4, 64, 32, 64), (20, 128, 64, 128)]
)
def test_demo_sizes_on_the_card(heads: int, value: int, rope: int, page: int) -> None:
    check(make([1] * 4, [1, 70, 500, 3], heads, value, rope, page), 600)
    check(make([3] * 3, [3, 70, 500], heads, value, rope, page), 600)
