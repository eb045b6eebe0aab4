"""Triton kernels of `penalties.py`: one launch each, however many rows have penalties."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .penalties import MOST
from .sampling_triton import load_logits

_CHUNK = 4096


@triton.jit(do_not_specialize=("num_drafts",))
def _penalise_kernel(
    logits, rows, slots, counts, repetition, frequency, presence, drafts,
    stride, counts_stride, width, num_drafts, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(1)
    row = tl.load(rows + at)
    slot = tl.load(slots + row)
    if slot >= 0:
        ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        inside = ids // GROUP < width // GROUP
        x = load_logits(logits, at, stride, ids, width, GROUP)
        times = tl.load(counts + slot.to(tl.int64) * counts_stride + ids, mask=inside, other=0)
        times = times.to(tl.int32)
        for draft in range(num_drafts):
            times += (ids == tl.load(drafts + at * num_drafts + draft)).to(tl.int32)
        factor = tl.load(repetition + row)
        pushed = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + factor), x * factor)
        lowered = pushed - tl.load(frequency + row) * times - tl.load(presence + row)
        tl.store(
            logits + at.to(tl.int64) * stride + ids,
            tl.where(times > 0, lowered, x),
            mask=inside,
        )


@triton.jit(do_not_specialize=("count",))
def _count_kernel(rows, ids, slots, pairs, stride, count, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """`pairs` are the counts, two in each int32, since there is no atomic addition of 16 bits."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    slot = tl.load(slots + tl.load(rows + at, mask=inside, other=0))
    token = tl.load(ids + at, mask=inside, other=-1)
    inside = inside & (slot >= 0) & (token >= 0)
    pair = pairs + slot.to(tl.int64) * stride + token // 2
    shift = (token % 2 * 16).to(tl.int32)
    old = tl.load(pair, mask=inside, other=0)
    inside = inside & (((old >> shift) & 0xFFFF) < MOST)
    tl.atomic_add(pair, tl.full((BLOCK,), 1, tl.int32) << shift, mask=inside)


def launch_penalise(
    logits: Tensor,
    rows: Tensor,
    slots: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    drafts: Tensor | None,
) -> None:
    """Arguments as for `penalise`."""
    num_rows, width = logits.shape
    if not num_rows:
        return
    _penalise_kernel[(triton.cdiv(width, _CHUNK), num_rows)](
        logits, rows, slots, counts, repetition, frequency, presence,
        rows if drafts is None else drafts,
        logits.stride(0), counts.stride(0), width, 0 if drafts is None else drafts.shape[1],
        CHUNK=_CHUNK, GROUP=min(16, width & -width), num_warps=8,
    )  # fmt: skip


def launch_count(rows: Tensor, ids: Tensor, slots: Tensor, counts: Tensor) -> None:
    """Arguments as for `count`."""
    if len(rows):
        _count_kernel[(triton.cdiv(len(rows), 128),)](
            rows, ids, slots, counts.view(torch.int32), counts.stride(0) // 2, len(rows),
            MOST=MOST, BLOCK=128, num_warps=4,
        )  # fmt: skip
