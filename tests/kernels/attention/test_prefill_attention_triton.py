"""The Triton prefill kernels against their definitions."""

import pytest
import torch
from glimmer.kernels.attention.attend import attend, merge_
from glimmer.kernels.attention.prefill_attention_triton import launch_attend_rows, launch_merge

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
TOLERANCE = 2e-2 if CUDA else 1e-5


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    visible = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
    wide = [x.float().transpose(0, 1) for x in (q, k, v)]
    out, lse = attend(*wide, visible.tril() if causal else visible, 0.3)
    return out.transpose(0, 1), lse


@pytest.mark.parametrize(("heads", "dim", "value_dim"), [(2, 12, 20), (1, 16, 16)])
def test_packed_rows_and_one_row_over_a_prefix(heads: int, dim: int, value_dim: int) -> None:
    lens = (1, 70, 33)
    q, k = torch.randn(2, sum(lens), heads, dim, device=DEVICE).to(DTYPE)
    both = torch.randn(sum(lens), heads, 3 + value_dim, device=DEVICE).to(DTYPE)
    v = both[..., 3:]  # strided
    starts = torch.tensor((0, *lens), device=DEVICE).cumsum(0)
    out, lse = launch_attend_rows(q, k, v, starts, max(lens), True, 0.3)
    for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        expected, expected_lse = reference(q[a:b], k[a:b], v[a:b], causal=True)
        torch.testing.assert_close(out[a:b].float(), expected, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(lse[:, a:b], expected_lse, atol=TOLERANCE, rtol=TOLERANCE)
    out, lse = launch_attend_rows(q[:9], k, v, None, 9, False, 0.3)
    expected, expected_lse = reference(q[:9], k, v, causal=False)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse, expected_lse, atol=TOLERANCE, rtol=TOLERANCE)


def test_merge_equals_the_reference() -> None:
    a, b = torch.randn(2, 5, 3, 12, device=DEVICE)
    lse_a, lse_b = torch.randn(2, 3, 7, device=DEVICE)[..., 1:6] * 3
    expected = a.transpose(0, 1).contiguous()
    expected_lse = lse_a.clone()
    merge_(expected, expected_lse, b.transpose(0, 1), lse_b)
    lse = launch_merge(a, a, lse_a, b, lse_b)
    torch.testing.assert_close(a, expected.transpose(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_merge_refuses_sums_that_do_not_lie_along_the_tokens() -> None:
    a, b = torch.randn(2, 5, 3, 12, device=DEVICE)
    lse = torch.randn(3, 5, device=DEVICE)
    for first, second in ((lse.t().contiguous().t(), lse), (lse, lse.t().contiguous().t())):
        with pytest.raises(AssertionError, match="along the tokens"):
            launch_merge(a, a, first, b, second)


@pytest.mark.gpu
@pytest.mark.parametrize("num_keys", [1, 63, 1000])
def test_full_size_on_the_card(num_keys: int) -> None:
    q, k, v = torch.randn(3, num_keys, 20, 256, device=DEVICE).to(DTYPE) / 2
    for causal in (True, False):
        out, lse = launch_attend_rows(q, k, v, None, num_keys, causal, 0.3)
        expected, expected_lse = reference(q, k, v, causal)
        torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=2e-2)
        torch.testing.assert_close(lse, expected_lse, atol=1e-2, rtol=1e-2)
