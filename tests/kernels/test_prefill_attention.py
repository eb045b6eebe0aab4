"""Backends give the same outputs and log-sum-exps; here those that are installed."""

import pytest
import torch
from glimmer.kernels.prefill_attention import attend_rows

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def test_one_row_needs_no_starts() -> None:
    q, k, v = torch.randn(3, 5, 2, 16, device=DEVICE)
    starts = torch.tensor([0, 5], device=DEVICE)
    without, lse = attend_rows(q, k, v, None, (5,), True, 0.3, "triton")
    out, other = attend_rows(q, k, v, starts, (5,), True, 0.3, "triton")
    torch.testing.assert_close(without, out)
    torch.testing.assert_close(lse, other)


@pytest.mark.gpu
def test_fa3_agrees_with_triton() -> None:
    pytest.importorskip("fa3_fwd_interface")
    lens = (130, 1, 77)
    q, k, v = torch.randn(3, sum(lens), 20, 256, device=DEVICE).bfloat16()
    starts = torch.tensor((0, *lens), device=DEVICE).cumsum(0)
    for args in ((starts, lens, True), (None, (sum(lens),), True), (None, (sum(lens),), False)):
        expected, expected_lse = attend_rows(q, k, v, *args, 1 / 16, "triton")
        out, lse = attend_rows(q, k, v, *args, 1 / 16, "fa3")
        torch.testing.assert_close(out.float(), expected.float(), atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-3)
