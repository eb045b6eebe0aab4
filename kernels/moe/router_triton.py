"""Triton kernels of `router.py`: scores, choice and weights in one launch.

The product is split over slices of the hidden dimension. The last program of a block of tokens to
finish adds up the slices in their order and chooses, so the result does not depend on timing.

The product is about as precise as float32. Few tokens: three tensor-core products of 11-bit parts
of both factors (relative error about 2^-21). Many tokens of a 16-bit type: three products of x with
bfloat16 parts of the weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import counters, pdl
from .router import RouterSettings

_FEW_TOKENS = 256


@triton.jit
def _route_kernel(
    x, weight, bias, ids, weights, partial, arrivals, num_tokens, x_stride, hidden, num_experts,
    scaling, NUM_CHOSEN: tl.constexpr, NUM_SHARED: tl.constexpr, NORMALISE: tl.constexpr,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (block, split) multiply a block of tokens, for one slice of the hidden dimension."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    k = split * STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
    is_expert = experts[None, :] < num_experts
    w_at = weight + experts[None, :] * hidden
    w = tl.load(w_at + k[:, None], mask=is_expert & (k[:, None] < hidden), other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x_at = x + tokens[:, None].to(tl.int64) * x_stride
    is_token = tokens[:, None] < num_tokens
    scores = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for step in range(STEPS):
        if step > 0:
            w = tl.load(w_at + k[:, None], mask=is_expert & (k[:, None] < hidden), other=0.0)
        part = tl.load(x_at + k[None, :], mask=is_token & (k[None, :] < hidden), other=0.0)
        scores = tl.dot(part.to(tl.float32), w.to(tl.float32), scores, input_precision="tf32x3")
        k += BLOCK_K
    if SPLITS > 1:
        at = tl.arange(0, BLOCK_T)[:, None] * BLOCK_E + experts[None, :]
        base = partial + block * (SPLITS * BLOCK_T * BLOCK_E)
        tl.store(base + split * (BLOCK_T * BLOCK_E) + at, scores)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + block, 1, sem="acq_rel") != SPLITS - 1:
            return
        tl.store(arrivals + block, 0)
        scores = _sum_of_parts(base, SPLITS, BLOCK_T, BLOCK_E)
    _finish(
        scores, bias, ids, weights, tokens, num_tokens, num_experts, scaling, NUM_CHOSEN,
        NUM_SHARED, NORMALISE, BLOCK_T, BLOCK_E, BLOCK_C,
    )  # fmt: skip


@triton.jit
def _route_many_kernel(
    x, weight, bias, ids, weights, partial, arrivals, num_tokens, x_stride, hidden, num_experts,
    scaling, NUM_CHOSEN: tl.constexpr, NUM_SHARED: tl.constexpr, NORMALISE: tl.constexpr,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_route_kernel`, for many tokens of a 16-bit type. Three bfloat16 parts hold the 24 bits
    of a weight."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    k = split * STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    w_at = weight + experts[:, None] * hidden
    x_at = x + tokens[:, None].to(tl.int64) * x_stride
    acc = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    for _ in range(STEPS):
        inside = k[None, :] < hidden
        w = tl.load(w_at + k[None, :], mask=(experts[:, None] < num_experts) & inside, other=0.0)
        part = tl.load(x_at + k[None, :], mask=(tokens[:, None] < num_tokens) & inside, other=0.0)
        high = w.to(part.dtype)
        rest = w - high.to(tl.float32)
        middle = rest.to(part.dtype)
        low = (rest - middle.to(tl.float32)).to(part.dtype)
        acc = tl.dot(low, part.T, acc)
        acc = tl.dot(middle, part.T, acc)
        acc = tl.dot(high, part.T, acc)
        k += BLOCK_K
    # Storing the parts and reading them back also transposes the block. So there are always at
    # least two splits.
    base = partial + block * (SPLITS * BLOCK_T * BLOCK_E)
    transposed = tl.arange(0, BLOCK_T)[None, :] * BLOCK_E + experts[:, None]
    tl.store(base + split * (BLOCK_T * BLOCK_E) + transposed, acc)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + block, 1, sem="acq_rel") != SPLITS - 1:
        return
    tl.store(arrivals + block, 0)
    scores = _sum_of_parts(base, SPLITS, BLOCK_T, BLOCK_E)
    _finish(
        scores, bias, ids, weights, tokens, num_tokens, num_experts, scaling, NUM_CHOSEN,
        NUM_SHARED, NORMALISE, BLOCK_T, BLOCK_E, BLOCK_C,
    )  # fmt: skip


@triton.jit
def _norm_route_kernel(
    x, norm, normed, weight, bias, ids, weights, partial, arrivals, hidden, num_experts, eps,
    scaling, NUM_CHOSEN: tl.constexpr, NUM_SHARED: tl.constexpr, NORMALISE: tl.constexpr,
    SPLITS: tl.constexpr, ROW: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (split, token) compute the RMS norm of the whole token and multiply one slice."""
    split = tl.program_id(0)
    token = tl.program_id(1)
    x += token * hidden
    normed += token * hidden
    partial += token * SPLITS * BLOCK_E
    arrivals += token
    experts = tl.arange(0, BLOCK_E)
    k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < hidden
    gain = tl.load(norm + k, mask=inside, other=0.0)
    mask = (experts[:, None] < num_experts) & inside[None, :]
    w = tl.load(weight + experts[:, None] * hidden + k[None, :], mask=mask, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.arange(0, ROW)
    wide = tl.load(x + row, mask=row < hidden, other=0.0).to(tl.float32)
    value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    value = value.to(normed.dtype.element_ty).to(tl.float32) * gain.to(tl.float32)
    value = value.to(normed.dtype.element_ty)
    tl.store(normed + k, value, mask=inside)
    part = tl.sum(w.to(tl.float32) * value.to(tl.float32)[None, :], 1)
    tl.store(partial + split * BLOCK_E + experts, part)
    tl.debug_barrier()
    if tl.atomic_add(arrivals, 1, sem="acq_rel") != SPLITS - 1:
        return
    tl.store(arrivals, 0)
    scores = _sum_of_parts(partial, SPLITS, 1, BLOCK_E)
    _finish(
        scores, bias, ids, weights, token + tl.arange(0, 1), token + 1, num_experts, scaling,
        NUM_CHOSEN, NUM_SHARED, NORMALISE, 1, BLOCK_E, BLOCK_C,
    )  # fmt: skip


@triton.jit
def _sum_of_parts(base, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Add up the products of all slices of a block of tokens, in order -> [BLOCK_T, BLOCK_E]."""
    at = tl.arange(0, BLOCK_T)[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    scores = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for split in range(SPLITS):
        scores += tl.load(base + split * (BLOCK_T * BLOCK_E) + at, cache_modifier=".cg")
    return scores


@triton.jit
def _finish(
    scores, bias, ids, weights, tokens, num_tokens, num_experts, scaling, NUM_CHOSEN: tl.constexpr,
    NUM_SHARED: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Choose experts by the products [BLOCK_T, BLOCK_E], and store ids and weights."""
    experts = tl.arange(0, BLOCK_E)
    is_expert = experts < num_experts
    scores = 1.0 / (1.0 + tl.exp(-scores))
    offset = tl.load(bias + experts, mask=is_expert, other=0.0)
    choice = tl.where(is_expert[None, :], scores + offset[None, :], -float("inf"))
    best, value = _choose(
        scores, choice, num_experts, scaling, NUM_CHOSEN, NORMALISE, BLOCK_T, BLOCK_E, BLOCK_C
    )
    columns = tl.arange(0, BLOCK_C)[None, :]
    width: tl.constexpr = NUM_CHOSEN + NUM_SHARED
    out = tokens[:, None] * width + columns
    mask = (tokens[:, None] < num_tokens) & (columns < width)
    tl.store(ids + out, best, mask=mask)
    tl.store(weights + out, value, mask=mask)


@triton.jit
def _choose(
    scores, choice, num_experts, scaling, NUM_CHOSEN: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The experts with the NUM_CHOSEN largest values of `choice`, of equal ones the lowest first.

    -> ids and weights (scaled scores), [BLOCK_T, BLOCK_C] each. The columns from NUM_CHOSEN on hold
    the experts from num_experts on, with weight 1.
    """
    experts = tl.arange(0, BLOCK_E)[None, :]
    columns = tl.arange(0, BLOCK_C)[None, :]
    best = tl.zeros((BLOCK_T, BLOCK_C), tl.int32) + num_experts - NUM_CHOSEN + columns
    value = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_T, 1), tl.float32)
    for column in tl.static_range(NUM_CHOSEN):
        expert = tl.argmax(choice, 1, tie_break_left=True)[:, None]
        is_chosen = experts == expert
        score = tl.sum(tl.where(is_chosen, scores, 0.0), 1)[:, None]
        choice = tl.where(is_chosen, -float("inf"), choice)
        best = tl.where(columns == column, expert, best)
        value = tl.where(columns == column, score, value)
        total += score
    if NORMALISE:
        value = value / (total + 1e-20)
    return best, tl.where(columns < NUM_CHOSEN, value * scaling, 1.0)


def launch_route(
    x: Tensor,
    weight: Tensor,
    correction_bias: Tensor,
    settings: RouterSettings,
    num_shared: int,
) -> tuple[Tensor, Tensor]:
    """Arguments as for `route`, of a model without groups; ids are int32."""
    num_tokens, hidden = x.shape
    num_experts = len(weight)
    num_chosen = settings.num_chosen
    ids, weights = _outputs(x, num_chosen + num_shared)
    if not num_tokens:
        return ids, weights
    block_e = max(16, triton.next_power_of_2(num_experts))
    if num_tokens > _FEW_TOKENS and x.element_size() == 2 and weight.dtype == torch.float32:
        kernel, programs, least, num_stages = _route_many_kernel, 132, 2, 3
        block_t = 32 if num_tokens <= 2048 else 64
        block_e, block_k = max(64, block_e), 64
    else:
        kernel, programs, least, num_stages = _route_kernel, 264, 1, 2
        block_t = 16
        block_k = 128 if block_e <= 64 else 64
    block_k = min(block_k, max(16, triton.next_power_of_2(hidden)))
    blocks = triton.cdiv(num_tokens, block_t)
    chunks = triton.cdiv(hidden, block_k)
    splits = max(least, min(chunks, programs // blocks))
    steps = triton.next_power_of_2(triton.cdiv(chunks, splits))  # so that few kernels are compiled
    splits = max(least, triton.cdiv(chunks, steps))
    partial = weights
    if splits > 1:
        partial = torch.empty(
            blocks * splits * block_t * block_e, dtype=torch.float32, device=x.device
        )
    kernel[(blocks, splits)](
        x, weight, correction_bias, ids, weights, partial, counters(x.device, blocks), num_tokens,
        x.stride(0), hidden, num_experts, settings.scaling, NUM_CHOSEN=num_chosen,
        NUM_SHARED=num_shared, NORMALISE=settings.normalise, SPLITS=splits, STEPS=steps,
        BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=block_k,
        BLOCK_C=triton.next_power_of_2(num_chosen + num_shared), num_warps=4, num_stages=num_stages,
        **pdl(),
    )  # fmt: skip
    return ids, weights


def launch_norm_route(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    correction_bias: Tensor,
    settings: RouterSettings,
    num_shared: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as for `norm_route`, of a model without groups; each token by itself. ids are
    int32."""
    num_tokens, hidden = x.shape
    num_experts = len(weight)
    num_chosen = settings.num_chosen
    ids, weights = _outputs(x, num_chosen + num_shared)
    normed = torch.empty_like(x)
    block_e = max(16, triton.next_power_of_2(num_experts))
    block_k = min(64, triton.next_power_of_2(hidden))
    splits = triton.cdiv(hidden, block_k)
    partial = torch.empty(num_tokens * splits * block_e, dtype=torch.float32, device=x.device)
    arrivals = counters(x.device, num_tokens)
    _norm_route_kernel[(splits, num_tokens)](
        x, norm, normed, weight, correction_bias, ids, weights, partial, arrivals,
        hidden, num_experts, eps, settings.scaling, NUM_CHOSEN=num_chosen, NUM_SHARED=num_shared,
        NORMALISE=settings.normalise, SPLITS=splits, ROW=triton.next_power_of_2(hidden),
        BLOCK_E=block_e, BLOCK_K=block_k,
        BLOCK_C=triton.next_power_of_2(num_chosen + num_shared), num_warps=4, **pdl(),
    )  # fmt: skip
    return normed, ids, weights


def _outputs(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    ids = torch.empty(len(x), width, dtype=torch.int32, device=x.device)
    return ids, torch.empty(ids.shape, dtype=torch.float32, device=x.device)
