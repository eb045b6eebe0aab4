"""How decode rows are cut: every batch gets a plan that the kernels have room for."""

import pytest
import torch
import triton
import triton.language as tl
from glimmer.kernels.attention.mla_decode_split import (
    find_item,
    partial_results,
    plan_splits,
    row_work,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("num_rows", [1, 7, 32, 133, 256, 512, 2000])
@pytest.mark.parametrize("max_query_len", [1, 4, 512])
def test_plans_bound_what_partial_results_need(num_rows: int, max_query_len: int) -> None:
    plan = plan_splits(num_rows, max_query_len, 20, 202752, 132)
    assert plan.blocks * plan.columns >= max_query_len * 20
    assert 1 <= plan.least_chunks <= plan.most_chunks <= 128
    parts = num_rows * plan.blocks * plan.most_chunks
    assert plan.most_chunks == 1 or parts <= 4096
    assert 1 <= plan.num_programs <= 132
    max_columns = max_query_len * 20
    values, peaks, sums = partial_results(plan, max_columns, num_rows, torch.empty(1, 20, 4))
    num_lines = parts * min(plan.columns, max_columns) if plan.most_chunks > 1 else 0
    assert values.shape == (num_lines, 4)
    assert len(peaks) == len(sums) == num_lines


@pytest.mark.parametrize(
    ("num_rows", "chunks"), [(1, 128), (8, 16), (20, 6), (32, 4), (64, 2), (132, 1), (256, 1)]
)
def test_chunks_fill_the_multiprocessors(num_rows: int, chunks: int) -> None:
    assert plan_splits(num_rows, 1, 20, 202752, 132).least_chunks == chunks


@triton.jit
def _item_kernel(query_starts, lengths, out, num_rows, num_heads, least_chunks, most_chunks):
    """Store (row, block, first token, end) of work item `program_id`."""
    row_ids = tl.arange(0, 16)
    rows = row_work(
        row_ids, query_starts, lengths, num_rows, num_heads, least_chunks, most_chunks, 16
    )
    item = tl.program_id(0)
    ends = tl.cumsum(rows[4], 0)
    row, _, _, _, _, block, first, end = find_item(
        item, row_ids, rows, ends, least_chunks, most_chunks
    )
    tl.store(out + item * 4, row)
    tl.store(out + item * 4 + 1, block)
    tl.store(out + item * 4 + 2, first)
    tl.store(out + item * 4 + 3, end)


def test_the_example_of_the_docstring() -> None:
    starts = torch.tensor([0, 1, 3], device=DEVICE)
    lengths = torch.tensor([200, 70], device=DEVICE)
    items = torch.zeros(6, 4, dtype=torch.int32, device=DEVICE)
    _item_kernel[(6,)](starts, lengths, items, 2, 16, 2, 4)
    assert items.tolist() == [
        [0, 0, 0, 128],
        [0, 0, 128, 200],
        [1, 0, 0, 64],
        [1, 0, 64, 70],
        [1, 1, 0, 64],
        [1, 1, 64, 70],
    ]
