"""The one-launch routers against the torch reference.

Both compute in float32, in another order: ids may differ only where two scores are as good as
equal, which these seeds avoid by checking the margin.
"""

import pytest
import torch
from glimmer.kernels.dense.linear import rms_norm_reference
from glimmer.kernels.moe.router import RouterSettings, norm_route, route
from glimmer.kernels.moe.router_triton import launch_norm_route, launch_route

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float16  # the interpreter gets bfloat16 products wrong


def check(num_tokens: int, hidden: int, experts: int, k: int, shared: int, norm: bool) -> None:
    x = torch.randn(num_tokens, hidden + 8, device=DEVICE)[:, :hidden].to(DTYPE)
    weight = torch.randn(experts, hidden, device=DEVICE) * hidden**-0.5
    bias = torch.randn(experts, device=DEVICE) * 0.1
    settings = RouterSettings(k, 1, 1, norm, 1.8)
    ids, weights = launch_route(x, weight, bias, settings, shared)
    again = launch_route(x, weight, bias, settings, shared)
    assert torch.equal(ids, again[0])
    assert torch.equal(weights, again[1])
    assert ids[:, k:].tolist() == [list(range(experts, experts + shared))] * num_tokens
    assert weights[:, k:].eq(1).all()
    cpu = (x.cpu(), weight.cpu(), bias.cpu())
    expected, scores = route(*cpu, settings)
    choice = ((cpu[0].double() @ cpu[1].double().T).sigmoid() + cpu[2]).topk(min(k + 1, experts))
    clear = torch.ones(num_tokens, dtype=torch.bool)
    if k < experts:
        clear = choice.values[:, k - 1] - choice.values[:, k] > 1e-5
    assert clear.float().mean() > 0.98
    order, other = ids[:, :k].cpu().long().sort(-1), expected.sort(-1)
    assert torch.equal(order.values[clear], other.values[clear])
    got = weights[:, :k].cpu().gather(1, order.indices)[clear]
    torch.testing.assert_close(got, scores.gather(1, other.indices)[clear], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_tokens", "hidden", "experts", "k", "shared", "norm"),
    [
        *((1, 96, 8, 2, 1, True), (19, 200, 40, 4, 0, False), (3, 16, 5, 5, 2, True)),
        *((257, 200, 40, 4, 1, True), (300, 64, 70, 2, 0, False)),  # the kernel for many
    ],
)  # fmt: skip
def test_choice_and_weights(
    num_tokens: int, hidden: int, experts: int, k: int, shared: int, norm: bool
) -> None:
    check(num_tokens, hidden, experts, k, shared, norm)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize(
    ("hidden", "experts", "k", "shared"), [(96, 8, 2, 1), (200, 40, 4, 0), (16, 5, 5, 2)]
)
def test_each_token_normed_first(
    num_tokens: int, hidden: int, experts: int, k: int, shared: int
) -> None:
    check_norm(num_tokens, hidden, experts, k, shared)


def check_norm(num_tokens: int, hidden: int, experts: int, k: int, shared: int) -> None:
    settings = RouterSettings(k, 1, 1, True, 1.8)
    for _ in range(5):
        x = torch.randn(num_tokens, hidden, device=DEVICE).to(DTYPE)
        norm = torch.rand(hidden, device=DEVICE).to(DTYPE)
        weight = torch.randn(experts, hidden, device=DEVICE) * hidden**-0.5
        bias = torch.randn(experts, device=DEVICE) * 0.1
        normed, ids, weights = launch_norm_route(x, norm, 1e-5, weight, bias, settings, shared)
        step = torch.finfo(DTYPE).eps
        expected = rms_norm_reference(x, norm, 1e-5)
        torch.testing.assert_close(normed, expected, atol=step, rtol=2 * step)
        same_ids, same_weights = launch_route(normed, weight, bias, settings, shared)
        assert torch.equal(ids, same_ids)
        torch.testing.assert_close(weights, same_weights, atol=1e-5, rtol=1e-5)


def test_equal_scores_go_to_the_lowest_expert() -> None:
    zeros = torch.zeros(20, 32, device=DEVICE)
    settings = RouterSettings(3, 1, 1, True, 1.5)
    ids, weights = launch_route(zeros, zeros[:9], zeros[0, :9].clone(), settings, 0)
    assert ids.tolist() == [[0, 1, 2]] * 20
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("hidden", "experts", "k", "num_tokens"),
    [(2048, 64, 4, t) for t in (1, 2, 3, 7, 16, 17, 33, 64, 100, 256, 512, 768, 1000, 2048, 8192)]
    + [(*dims, t) for dims in ((128, 8, 2), (104, 16, 4), (1024, 256, 8)) for t in (1, 33)],
)
def test_on_the_card(hidden: int, experts: int, k: int, num_tokens: int) -> None:
    check(num_tokens, hidden, experts, k, 1, True)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_each_token_normed_first_on_the_card(num_tokens: int) -> None:
    check_norm(num_tokens, 2048, 64, 4, 1)
    x = torch.randn(num_tokens, 2048, device=DEVICE).to(DTYPE)
    norm = torch.rand(2048, device=DEVICE)
    weight, bias = torch.randn(64, 2048, device=DEVICE) * 2048**-0.5, torch.zeros(64, device=DEVICE)
    settings = RouterSettings(4, 1, 1, True, 1.8)
    found = norm_route(x, norm.to(DTYPE), 1e-5, weight, bias, settings, 1)
    again = norm_route(x, norm.to(DTYPE), 1e-5, weight, bias, settings, 1)
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)
