"""Blocks of keys merge to what all keys at once give."""

import torch
from glimmer.kernels.attention.attend import attend, merge_


def test_merged_blocks_equal_one_softmax() -> None:
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 13, 8), torch.randn(2, 13, 3)
    visible = torch.rand(5, 13) < 0.5
    visible[:, 12] = True
    visible[1, :12] = False  # sees nothing in the first blocks
    scores = (q.double() @ k.double().mT * 0.3).masked_fill(~visible, -torch.inf)
    expected = scores.softmax(-1) @ v.double()
    out, lse = torch.zeros(2, 5, 3), torch.full((2, 5), -torch.inf)
    for begin in range(0, 13, 4):
        part = slice(begin, begin + 4)
        merge_(out, lse, *attend(q, k[:, part], v[:, part], visible[:, part], 0.3))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros_and_minus_infinity() -> None:
    q, k = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    out, lse = attend(q, k, k, torch.zeros(2, 3, dtype=torch.bool), 1.0)
    assert out.abs().max() == 0
    assert lse.eq(-torch.inf).all()
    total, total_lse = torch.zeros(1, 2, 4), torch.full((1, 2), -torch.inf)
    merge_(total, total_lse, out, lse)
    assert total.abs().max() == 0
    assert total_lse.eq(-torch.inf).all()


def test_large_scores_do_not_overflow() -> None:
    q, k = torch.full((1, 1, 1), 300.0), torch.tensor([[[300.0], [-300.0]]])
    out, lse = attend(q, k, torch.tensor([[[1.0], [2.0]]]), None, 1.0)
    assert out.item() == 1
    assert lse.item() == 90000
