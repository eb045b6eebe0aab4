"""Triton kernel of `router.py`: scores, choice and weights in one launch.

The product is split over slices of the hidden dimension; the last program of a token block to
finish adds the slices up in their order and chooses, so the result does not depend on timing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import counters, pdl


@triton.jit
def _route_kernel(
    x, weight, bias, ids, weights, partial, arrivals, num_tokens, x_stride, hidden, num_experts,
    scaling, NUM_CHOSEN: tl.constexpr, NUM_SHARED: tl.constexpr, NORMALISE: tl.constexpr,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    split = tl.program_id(1)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    k = split * STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
    real = experts[None, :] < num_experts
    w_at = weight + experts[None, :] * hidden
    w = tl.load(w_at + k[:, None], mask=real & (k[:, None] < hidden), other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x_at = x + tokens[:, None].to(tl.int64) * x_stride
    there = tokens[:, None] < num_tokens
    scores = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for step in range(STEPS):
        if step > 0:
            w = tl.load(w_at + k[:, None], mask=real & (k[:, None] < hidden), other=0.0)
        part = tl.load(x_at + k[None, :], mask=there & (k[None, :] < hidden), other=0.0)
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
        scores = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for other in range(SPLITS):
            scores += tl.load(base + other * (BLOCK_T * BLOCK_E) + at, cache_modifier=".cg")
    scores = 1.0 / (1.0 + tl.exp(-scores))
    offset = tl.load(bias + experts, mask=experts < num_experts, other=0.0)
    choice = tl.where(real, scores + offset[None, :], -float("inf"))
    best, value = _choose(
        scores, choice, num_experts, scaling, NUM_CHOSEN, NORMALISE, BLOCK_T, BLOCK_E, BLOCK_C
    )
    places = tl.arange(0, BLOCK_C)[None, :]
    width: tl.constexpr = NUM_CHOSEN + NUM_SHARED
    out = tokens[:, None] * width + places
    keep = there & (places < width)
    tl.store(ids + out, best, mask=keep)
    tl.store(weights + out, value, mask=keep)


@triton.jit
def _choose(
    scores, choice, num_experts, scaling, NUM_CHOSEN: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The best NUM_CHOSEN of `choice`, the lowest first of equals, with their scaled scores; behind
    them the experts from num_experts on with weight 1. -> [BLOCK_T, BLOCK_C] each."""
    experts = tl.arange(0, BLOCK_E)[None, :]
    places = tl.arange(0, BLOCK_C)[None, :]
    best = tl.zeros((BLOCK_T, BLOCK_C), tl.int32) + num_experts - NUM_CHOSEN + places
    value = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_T, 1), tl.float32)
    for place in tl.static_range(NUM_CHOSEN):
        expert = tl.argmax(choice, 1, tie_break_left=True)[:, None]
        taken = experts == expert
        score = tl.sum(tl.where(taken, scores, 0.0), 1)[:, None]
        choice = tl.where(taken, -float("inf"), choice)
        best = tl.where(places == place, expert, best)
        value = tl.where(places == place, score, value)
        total += score
    if NORMALISE:
        value = value / (total + 1e-20)
    return best, tl.where(places < NUM_CHOSEN, value * scaling, 1.0)


def launch_route(
    x: Tensor,
    weight: Tensor,
    correction_bias: Tensor,
    num_chosen: int,
    normalise: bool,
    scaling: float,
    num_shared: int,
) -> tuple[Tensor, Tensor]:
    """`route` without groups; ids are int32. The product has float32's precision from three
    tensor-core products of 11-bit parts (relative error about 2^-21)."""
    num_tokens, hidden = x.shape
    num_experts = len(weight)
    ids = torch.empty(num_tokens, num_chosen + num_shared, dtype=torch.int32, device=x.device)
    weights = torch.empty(ids.shape, dtype=torch.float32, device=x.device)
    if not num_tokens:
        return ids, weights
    block_t = 16 if num_tokens <= 1024 else 64
    block_e = max(16, triton.next_power_of_2(num_experts))
    block_k = 128 if block_e <= 64 and block_t == 16 else 64
    block_k = min(block_k, max(16, triton.next_power_of_2(hidden)))
    blocks = triton.cdiv(num_tokens, block_t)
    chunks = triton.cdiv(hidden, block_k)
    # Two small programs on each multiprocessor of an H100, or one of the others.
    splits = max(1, min(chunks, (264 if block_t == 16 else 132) // blocks))
    steps = triton.next_power_of_2(triton.cdiv(chunks, splits))  # few variants
    splits = triton.cdiv(chunks, steps)
    partial = weights
    if splits > 1:
        partial = torch.empty(
            blocks * splits * block_t * block_e, dtype=torch.float32, device=x.device
        )
    _route_kernel[(blocks, splits)](
        x,
        weight,
        correction_bias,
        ids,
        weights,
        partial,
        counters(x.device, blocks),
        num_tokens,
        x.stride(0),
        hidden,
        num_experts,
        scaling,
        NUM_CHOSEN=num_chosen,
        NUM_SHARED=num_shared,
        NORMALISE=normalise,
        SPLITS=splits,
        STEPS=steps,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_K=block_k,
        BLOCK_C=triton.next_power_of_2(num_chosen + num_shared),
        num_warps=4 if block_t == 16 else 8,
        **pdl(),
    )
    return ids, weights
