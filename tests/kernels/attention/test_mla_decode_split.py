"""How decode rows are cut: every batch gets a plan that the kernels have room for."""

import pytest
from glimmer.kernels.attention.mla_decode_split import plan_splits


@pytest.mark.parametrize("num_rows", [1, 7, 32, 133, 256, 512, 2000])
@pytest.mark.parametrize("max_query_len", [1, 4, 512])
def test_plans_bound_what_partial_results_need(num_rows: int, max_query_len: int) -> None:
    plan = plan_splits(num_rows, max_query_len, 20, 202752, 132)
    assert plan.blocks * plan.columns >= max_query_len * 20
    assert 1 <= plan.least_chunks <= plan.most_chunks <= 128
    parts = num_rows * plan.blocks * plan.most_chunks
    assert plan.most_chunks == 1 or parts <= 4096
    assert 1 <= plan.num_programs <= 132


@pytest.mark.parametrize(
    ("num_rows", "chunks"), [(1, 128), (8, 16), (20, 6), (32, 4), (64, 2), (132, 1), (256, 1)]
)
def test_chunks_fill_the_multiprocessors(num_rows: int, chunks: int) -> None:
    assert plan_splits(num_rows, 1, 20, 202752, 132).least_chunks == chunks
