"""Absorbed attention over pages against a loop over queries."""

import pytest
import torch
from glimmer.kernels.attention.mla_decode import mla_decode
from glimmer.kernels.attention.paged_rows import PagedRows

PAGE, WIDTH, VALUE, HEADS, SCALE = 4, 6, 5, 3, 0.37
LENGTHS = (1, 3, 4, 5, 8, 9, 23)


def reference(
    queries: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    counts: list[int],
    lengths: list[int],
) -> torch.Tensor:
    out = torch.empty(len(queries), HEADS, VALUE, dtype=torch.float64)
    token = 0
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        latents = torch.stack([kv[table[row, p // PAGE], p % PAGE] for p in range(length)]).double()
        for i in range(count):
            seen = latents[: length - count + 1 + i]
            weights = (queries[token].double() @ seen.T * SCALE).softmax(-1)
            out[token] = weights @ seen[:, :VALUE]
            token += 1
    return out


def run(counts: list[int], lengths: list[int], dtype: torch.dtype = torch.float32) -> None:
    pages = [-(-length // PAGE) for length in lengths]
    kv = torch.full((sum(pages) + 3, PAGE, WIDTH), 50.0)  # what must not be seen is loud
    order = torch.randperm(len(kv))
    table = torch.zeros(len(lengths), max(pages, default=0) + 1, dtype=torch.int32)
    used = 0
    for row, (num, length) in enumerate(zip(pages, lengths, strict=True)):
        table[row, :num] = order[used : used + num]
        used += num
        for p in range(length):
            kv[table[row, p // PAGE], p % PAGE] = torch.randn(WIDTH)
    kv = kv.to(dtype)
    queries = torch.randn(sum(counts), HEADS, WIDTH).to(dtype)
    starts = torch.tensor([0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()])
    sizes = torch.tensor(lengths, dtype=torch.int64)
    rows = PagedRows(table, starts, sizes, max(counts, default=1), max(lengths, default=0))
    got = mla_decode(queries, kv, rows, VALUE, SCALE)
    assert (got.dtype, got.shape) == (dtype, (sum(counts), HEADS, VALUE))
    expected = reference(queries, kv, table, counts, lengths)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("blocks", [1 << 24, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_query_per_row(
    blocks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glimmer.kernels.attention.mla_decode.MAX_SCORES", blocks)
    run([1] * len(LENGTHS), list(LENGTHS), dtype)
    run([1], [1])
    run([], [])


@pytest.mark.parametrize("blocks", [1 << 24, 50])
def test_several_causal_queries_per_row(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glimmer.kernels.attention.mla_decode.MAX_SCORES", blocks)
    run([1, 2, 4, 1, 3, 9, 5], [1, 3, 4, 5, 8, 9, 23])
    run([7], [12], torch.bfloat16)
