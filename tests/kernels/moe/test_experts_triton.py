"""Triton kernels of the mixture of experts against the torch reference.

On a card in bfloat16 over ugly sizes, without one small and under the interpreter in float16 (it
gets products of bfloat16 wrong). Tolerance: parts and intermediates are rounded to the type, so
errors are a few of its steps relative to the largest terms of a sum.
"""

import pytest
import torch
from glimmer.kernels.moe.experts import gated_mlp, moe, moe_reference
from glimmer.kernels.moe.experts_triton import (
    GemmConfig,
    combine,
    grouped,
    moe_grouped,
    moe_one,
    silu_mul,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float16
STEP = torch.finfo(DTYPE).eps
UGLY = (1, 2, 3, 7, 16, 17, 33, 64, 100, 256, 512, 1000, 8192)


def case(
    num_tokens: int, hidden: int, width: int, experts: int, k: int, dtype: torch.dtype = DTYPE
) -> list[torch.Tensor]:
    """x, ids (the last expert always chosen), weights, gate_up, down; values near 1."""
    x = torch.randn(num_tokens, hidden, device=DEVICE)
    ids = torch.rand(num_tokens, experts - 1, device=DEVICE).argsort(-1)[:, :k]
    ids = torch.cat((ids, torch.full_like(ids[:, :1], experts - 1)), 1).int()
    weights = torch.rand(ids.shape, device=DEVICE)
    gate_up = torch.randn(experts, 2 * width, hidden, device=DEVICE, dtype=dtype) * hidden**-0.5
    down = torch.randn(experts, hidden, width, device=DEVICE, dtype=dtype) * width**-0.5
    return [x.to(dtype), ids, weights, gate_up, down]


def unused(args: list[torch.Tensor]) -> torch.Tensor:
    """A tensor for the result, with contents that must not be added to."""
    return torch.full_like(args[0], 100.0)


def check(got: torch.Tensor, args: list[torch.Tensor]) -> None:
    expected = moe_reference(*args).float()
    assert (got.dtype, got.shape) == (args[0].dtype, args[0].shape)
    torch.testing.assert_close(got.float(), expected, atol=6 * STEP, rtol=4 * STEP)


@pytest.mark.parametrize(("num_tokens", "hidden", "width"), [(1, 96, 48), (2, 40, 24)])
def test_each_token_by_itself(num_tokens: int, hidden: int, width: int) -> None:
    args = case(num_tokens, hidden, width, 8, 2)
    tile = (16, 32, 4, 32, 16, 4)
    check(moe_one(*args, tile, unused(args), False), args)
    old = torch.randn_like(args[0])
    check(moe_one(*args, tile, old.clone(), True) - old, args)


@pytest.mark.parametrize(
    ("num_tokens", "experts", "tma"), [(2, 9, True), (7, 9, False), (17, 5, True)]
)
def test_few_tokens_unsorted(num_tokens: int, experts: int, tma: bool) -> None:
    args = case(num_tokens, 72, 48, experts, 2)
    config = GemmConfig(32, 32, 32, 4, 2, tma)
    if tma:
        check(moe_grouped(*args, (config, config), unused(args), False), args)
    else:
        old = torch.randn_like(args[0])
        check(moe_grouped(*args, (config, config), old.clone(), True) - old, args)


@pytest.mark.parametrize(("num_tokens", "hidden"), [(33, 104), (70, 96)])
def test_many_tokens_sorted(num_tokens: int, hidden: int) -> None:
    args = case(num_tokens, hidden, 48, 5, 2)
    up, down = GemmConfig(32, 16, 64, 4, 2), GemmConfig(64, 16, 32, 4, 2)
    check(moe_grouped(*args, (up, down), unused(args), False), args)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, ids, weights, gate_up, down = case(12, 64, 32, 9, 2)
    config = GemmConfig(32, 16, 32, 4, 2)
    out, few = torch.empty_like(x), torch.empty_like(x[3:9])
    whole = moe_grouped(x, ids, weights, gate_up, down, (config, config), out, False)
    rest = (gate_up, down, (config, config), few, False)
    part = moe_grouped(x[3:9], ids[3:9], weights[3:9], *rest)
    assert torch.equal(whole[3:9], part)


def test_gate_times_up_and_weighted_sum() -> None:
    both = torch.randn(3, 2 * 37, device=DEVICE)
    gate, up = both.chunk(2, 1)
    torch.testing.assert_close(silu_mul(both), torch.nn.functional.silu(gate) * up)
    parts, weights = torch.randn(6, 37, device=DEVICE), torch.rand(2, 3, device=DEVICE)
    expected = (parts.view(2, 3, 37) * weights[..., None]).sum(1)
    out = torch.empty_like(expected)
    torch.testing.assert_close(combine(parts, weights, out, False), expected)
    torch.testing.assert_close(combine(parts, weights, out, True), 2 * expected)


def test_grouped_rows_are_those_of_pairs() -> None:
    x, ids, _, gate_up, down = case(3, 64, 32, 4, 1)
    config = GemmConfig(32, 16, 32, 4, 2)
    up = grouped(x, gate_up, ids, None, config, gated=True)
    rows = grouped(up, down, ids, None, config, gated=False)
    for pair, expert in enumerate(ids.flatten().tolist()):
        gate, more = (x[pair // 2].float() @ gate_up[expert].float().T).chunk(2)
        between = torch.nn.functional.silu(gate) * more
        torch.testing.assert_close(up[pair].float(), between, atol=4 * STEP, rtol=4 * STEP)
        part = up[pair].float() @ down[expert].float().T
        torch.testing.assert_close(rows[pair].float(), part, atol=4 * STEP, rtol=4 * STEP)


FULL, TINY, ODD = (2048, 1536, 65, 4), (128, 64, 9, 2), (104, 56, 16, 3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dims", "num_tokens"),
    [(FULL, n) for n in UGLY]
    + [(dims, n) for dims in (TINY, ODD, (2048, 384, 65, 4)) for n in (1, 7, 33, 256)],
)
def test_on_the_card(dims: tuple[int, int, int, int], num_tokens: int) -> None:
    args = case(num_tokens, *dims)
    got = moe(*args)
    check(got, args)
    assert torch.equal(got, moe(*args))
    added = torch.randn_like(got)
    total = added.float() + moe_reference(*args).float()
    moe(*args, added)
    torch.testing.assert_close(added.float(), total, atol=6 * STEP, rtol=4 * STEP)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 100])
@pytest.mark.parametrize(("hidden", "width"), [(128, 256), (2048, 10240)])
def test_dense_on_the_card(num_tokens: int, hidden: int, width: int) -> None:
    x = torch.randn(num_tokens, hidden, device=DEVICE).bfloat16()
    gate_up = (torch.randn(2 * width, hidden, device=DEVICE) * hidden**-0.5).bfloat16()
    down = (torch.randn(hidden, width, device=DEVICE) * width**-0.5).bfloat16()
    expected = gated_mlp(x.cpu().float(), gate_up.cpu().float(), down.cpu().float())
    got = gated_mlp(x, gate_up, down).cpu().float()
    torch.testing.assert_close(got, expected, atol=6 * STEP, rtol=4 * STEP)
