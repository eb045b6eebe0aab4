"""The examples in the docstrings of `paged_rows.py` are true."""

import torch
from glimmer.kernels.attention.mla_decode import mla_decode
from glimmer.kernels.attention.paged_rows import PagedRows


def test_slots_are_where_the_page_table_points() -> None:
    kv, latents = torch.zeros(8, 4, 1), torch.arange(6.0)[:, None]
    kv.flatten(0, 1)[[28, 29, 30, 31, 8, 9]] = latents
    assert kv[[7, 2]].flatten().tolist() == [0, 1, 2, 3, 4, 5, 0, 0]


def test_queries_are_the_last_tokens_of_their_rows() -> None:
    """With equal scores a query's output is the mean over the tokens that it sees, here their
    positions: half its own position."""
    kv = torch.zeros(8, 4, 2)
    kv[:, :, 1] = torch.arange(32.0).view(8, 4)  # loud wherever no row has a token
    kv[[7, 2], :, 1] = torch.arange(8.0).view(2, 4)
    kv[5, :3, 1] = torch.arange(3.0)
    rows = PagedRows(
        page_table=torch.tensor([[7, 2], [5, 0]], dtype=torch.int32),
        query_starts=torch.tensor([0, 2, 5]),
        lengths=torch.tensor([6, 3]),
        max_query_len=3,
        max_length=6,
    )
    seen = mla_decode(torch.zeros(5, 1, 2), kv, rows, 2, 1.0)[:, 0, 1]
    assert seen.tolist() == [2.0, 2.5, 0.0, 0.5, 1.0]
