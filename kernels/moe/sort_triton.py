"""Triton kernels that sort the pairs of `moe_triton.py` by expert, in blocks of a tile's height."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import pdl

_ONE_LAUNCH = 5120  # pairs
_CHUNK = 128
_VARYING = ("num_pairs", "max_blocks", "num_chunks")  # one compiled kernel serves all


@triton.jit
def _own_blocks(
    pairs, experts, mine, first, own, count, num_pairs, max_blocks, BLOCK_T: tl.constexpr
):
    """Names expert `mine` as that of its `own` blocks from `first` on and fills the last of them
    up. Expert 0, whose blocks are the last, marks what is behind them."""
    for begin in range(0, own, 32):
        lane = begin + tl.arange(0, 32)
        tl.store(experts + first + lane, mine + tl.zeros_like(lane), mask=lane < own)
    if mine == 0:
        for begin in range(first + own, max_blocks, 32):
            lane = begin + tl.arange(0, 32)
            tl.store(experts + lane, tl.full((32,), -1, tl.int32), mask=lane < max_blocks)
    filler = count + tl.arange(0, BLOCK_T)
    at = pairs + first * BLOCK_T + filler
    tl.store(at, num_pairs + tl.zeros_like(filler), mask=filler < own * BLOCK_T)


@triton.jit(do_not_specialize=_VARYING)
def _sort_kernel(
    ids, pairs, experts, num_pairs, num_experts, max_blocks, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program e lists the pairs of expert e, in blocks of BLOCK_T filled up with num_pairs, and
    names the expert of its blocks; -1 behind the last. The last experts, which the shared one is
    among, come first: theirs are the most blocks."""
    mine = tl.program_id(0)
    bins = tl.arange(0, BLOCK_E)  # bin BLOCK_E - 1 counts what is behind the end
    chunk = tl.arange(0, CHUNK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for begin in range(0, num_pairs, CHUNK):
        choice = tl.load(ids + begin + chunk, mask=begin + chunk < num_pairs, other=BLOCK_E - 1)
        counts += tl.histogram(choice.to(tl.int32), BLOCK_E)
    counts = tl.where(bins < num_experts, counts, 0)
    blocks = (counts + BLOCK_T - 1) // BLOCK_T
    first = tl.sum(tl.where(bins > mine, blocks, 0), 0)
    count = tl.sum(tl.where(bins == mine, counts, 0), 0)
    own = (count + BLOCK_T - 1) // BLOCK_T
    _own_blocks(pairs, experts, mine, first, own, count, num_pairs, max_blocks, BLOCK_T)
    target = pairs + first * BLOCK_T
    done = 0
    for begin in range(0, num_pairs, CHUNK):
        there = begin + chunk < num_pairs
        choice = tl.load(ids + begin + chunk, mask=there, other=-1).to(tl.int32)
        hit = (choice == mine).to(tl.int32)
        place = done + tl.cumsum(hit, 0) - 1
        tl.store(target + place, begin + chunk, mask=hit > 0)
        done += tl.sum(hit, 0)


@triton.jit(do_not_specialize=_VARYING)
def _scan_kernel(
    ids, totals, before, num_pairs, num_chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program e counts the pairs of expert e: totals[e], and before[e, c] ahead of chunk c."""
    mine = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS)
    pair = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    done = 0
    for begin in range(0, num_chunks, CHUNKS):
        at = begin * CHUNK + pair
        choice = tl.load(ids + at, mask=at < num_pairs, other=-1).to(tl.int32)
        count = tl.sum((choice == mine).to(tl.int32), 1)
        ahead = done + tl.cumsum(count, 0) - count
        here = begin + chunks
        tl.store(before + mine * num_chunks + here, ahead, mask=here < num_chunks)
        done += tl.sum(count, 0)
    tl.store(totals + mine, done)


@triton.jit(do_not_specialize=_VARYING)
def _place_kernel(
    ids, totals, before, pairs, experts, num_pairs, num_experts, max_blocks, num_chunks,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What `_sort_kernel` does, program c for the pairs of chunk c and the blocks of expert c."""
    mine = tl.program_id(0)
    bins = tl.arange(0, BLOCK_E)
    lane = tl.arange(0, CHUNK)
    pair = mine * CHUNK + lane
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    real = bins < num_experts
    total = tl.load(totals + bins, mask=real, other=0)
    blocks = (total + BLOCK_T - 1) // BLOCK_T
    first = tl.sum(blocks, 0) - tl.cumsum(blocks, 0)
    column = before + tl.minimum(mine, num_chunks - 1)  # more programs than chunks place nothing
    ahead = tl.load(column + bins * num_chunks, mask=real, other=0)
    choice = tl.load(ids + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    hit = choice[:, None] == bins[None, :]
    place = tl.sum(tl.where(hit, (first * BLOCK_T + ahead)[None, :], 0), 1)
    again = tl.load(ids + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    earlier = (choice[:, None] == again[None, :]) & (lane[None, :] < lane[:, None])
    place += tl.sum(earlier.to(tl.int32), 1)
    tl.store(pairs + place, pair, mask=pair < num_pairs)
    if mine < num_experts:
        start = tl.sum(tl.where(bins == mine, first, 0), 0)
        count = tl.sum(tl.where(bins == mine, total, 0), 0)
        own = (count + BLOCK_T - 1) // BLOCK_T
        _own_blocks(pairs, experts, mine, start, own, count, num_pairs, max_blocks, BLOCK_T)


def sort_pairs(ids: Tensor, num_experts: int, block_t: int) -> tuple[Tensor, Tensor]:
    """ids [num_tokens, k] contiguous -> (pairs [max_blocks * block_t] int32: each expert's, in
    blocks filled up with the number of pairs; expert of a block [max_blocks] int32, -1: none).
    Few pairs are sorted in one launch, more in two: a program counts one expert's, then a
    program places a chunk of all."""
    num_pairs = ids.numel()
    max_blocks = min(num_experts, num_pairs) + num_pairs // block_t
    pairs = torch.empty(max_blocks * block_t, dtype=torch.int32, device=ids.device)
    experts = torch.empty(max_blocks, dtype=torch.int32, device=ids.device)
    block_e = max(32, triton.next_power_of_2(num_experts + 1))
    if num_pairs <= _ONE_LAUNCH:
        _sort_kernel[(num_experts,)](
            ids, pairs, experts, num_pairs, num_experts, max_blocks, BLOCK_T=block_t,
            BLOCK_E=block_e, CHUNK=1024, num_warps=8, **pdl(),
        )  # fmt: skip
        return pairs, experts
    chunks = triton.cdiv(num_pairs, _CHUNK)
    totals = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    before = torch.empty(num_experts, chunks, dtype=torch.int32, device=ids.device)
    _scan_kernel[(num_experts,)](
        ids, totals, before, num_pairs, chunks, CHUNK=_CHUNK, CHUNKS=64, num_warps=8, **pdl()
    )
    _place_kernel[(max(chunks, num_experts),)](
        ids, totals, before, pairs, experts, num_pairs, num_experts, max_blocks, chunks,
        BLOCK_T=block_t, BLOCK_E=block_e, CHUNK=_CHUNK, **pdl(),
    )  # fmt: skip
    return pairs, experts
