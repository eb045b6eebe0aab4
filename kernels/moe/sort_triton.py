"""Triton kernels that sort (token, choice) pairs by expert, in blocks, for `experts_triton.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import pdl

_ONE_LAUNCH = 5120  # up to so many pairs are sorted by one kernel
_CHUNK = 128  # pairs that a program of the second of two kernels places
# Kernel arguments that Triton must not specialize on: one compiled kernel serves all.
_VARYING = ("num_pairs", "max_blocks", "num_chunks")


@triton.jit
def _finish_blocks(
    pairs, experts, expert, first, num_blocks, count, num_pairs, max_blocks, BLOCK_T: tl.constexpr
):
    """Store `expert` as the expert of its num_blocks blocks from `first` on, and pad the last one.
    Expert 0, whose blocks are the last, marks the unused blocks after them with -1."""
    for begin in range(0, num_blocks, 32):
        lane = begin + tl.arange(0, 32)
        tl.store(experts + first + lane, expert + tl.zeros_like(lane), mask=lane < num_blocks)
    if expert == 0:
        for begin in range(first + num_blocks, max_blocks, 32):
            lane = begin + tl.arange(0, 32)
            tl.store(experts + lane, tl.full((32,), -1, tl.int32), mask=lane < max_blocks)
    padding = count + tl.arange(0, BLOCK_T)
    at = pairs + first * BLOCK_T + padding
    tl.store(at, num_pairs + tl.zeros_like(padding), mask=padding < num_blocks * BLOCK_T)


@triton.jit(do_not_specialize=_VARYING)
def _sort_kernel(
    ids, pairs, experts, num_pairs, num_experts, max_blocks, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program e lists the pairs of expert e; see `sort_pairs`."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BLOCK_E)  # bin BLOCK_E - 1 counts lanes after the last pair
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
    first = tl.sum(tl.where(bins > expert, blocks, 0), 0)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    num_blocks = (count + BLOCK_T - 1) // BLOCK_T
    _finish_blocks(pairs, experts, expert, first, num_blocks, count, num_pairs, max_blocks, BLOCK_T)
    target = pairs + first * BLOCK_T
    done = 0
    for begin in range(0, num_pairs, CHUNK):
        is_pair = begin + chunk < num_pairs
        choice = tl.load(ids + begin + chunk, mask=is_pair, other=-1).to(tl.int32)
        hit = (choice == expert).to(tl.int32)
        index = done + tl.cumsum(hit, 0) - 1
        tl.store(target + index, begin + chunk, mask=hit > 0)
        done += tl.sum(hit, 0)


@triton.jit(do_not_specialize=_VARYING)
def _scan_kernel(
    ids, totals, before, num_pairs, num_chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program e counts the pairs of expert e: totals[e], and before[e, c], those before chunk c."""
    expert = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS)
    pair = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    done = 0
    for begin in range(0, num_chunks, CHUNKS):
        at = begin * CHUNK + pair
        choice = tl.load(ids + at, mask=at < num_pairs, other=-1).to(tl.int32)
        count = tl.sum((choice == expert).to(tl.int32), 1)
        num_before = done + tl.cumsum(count, 0) - count
        chunk = begin + chunks
        tl.store(before + expert * num_chunks + chunk, num_before, mask=chunk < num_chunks)
        done += tl.sum(count, 0)
    tl.store(totals + expert, done)


@triton.jit(do_not_specialize=_VARYING)
def _place_kernel(
    ids, totals, before, pairs, experts, num_pairs, num_experts, max_blocks, num_chunks,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the same lists as `_sort_kernel`: program i places the pairs of chunk i and finishes
    the blocks of expert i."""
    program = tl.program_id(0)
    bins = tl.arange(0, BLOCK_E)
    lane = tl.arange(0, CHUNK)
    pair = program * CHUNK + lane
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    is_expert = bins < num_experts
    total = tl.load(totals + bins, mask=is_expert, other=0)
    blocks = (total + BLOCK_T - 1) // BLOCK_T
    first = tl.sum(blocks, 0) - tl.cumsum(blocks, 0)
    column = before + tl.minimum(program, num_chunks - 1)  # programs without a chunk have no pairs
    num_before = tl.load(column + bins * num_chunks, mask=is_expert, other=0)
    choice = tl.load(ids + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    hit = choice[:, None] == bins[None, :]
    index = tl.sum(tl.where(hit, (first * BLOCK_T + num_before)[None, :], 0), 1)
    again = tl.load(ids + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    is_earlier = (choice[:, None] == again[None, :]) & (lane[None, :] < lane[:, None])
    index += tl.sum(is_earlier.to(tl.int32), 1)
    tl.store(pairs + index, pair, mask=pair < num_pairs)
    if program < num_experts:
        start = tl.sum(tl.where(bins == program, first, 0), 0)
        count = tl.sum(tl.where(bins == program, total, 0), 0)
        num_blocks = (count + BLOCK_T - 1) // BLOCK_T
        _finish_blocks(
            pairs, experts, program, start, num_blocks, count, num_pairs, max_blocks, BLOCK_T
        )


def sort_pairs(ids: Tensor, num_experts: int, block_t: int) -> tuple[Tensor, Tensor]:
    """List the pairs of each expert in blocks of `block_t`, so that a program of the grouped GEMM
    serves one expert.

    Pair token * k + choice stands for one of the k experts of a token. Experts come in descending
    order, because the last one may be a shared one, which has the most blocks. The last block of an
    expert is padded with the number of pairs, which is not the number of any pair. Example: 3
    tokens with ids [[0, 2], [1, 2], [0, 2]], 3 experts, block_t = 2.

        pair          0  1  2  3  4  5
        expert        0  2  1  2  0  2

        block         0      1      2      3      4, 5
        experts       2      2      1      0      -1 (unused)
        pairs         1, 3   5, 6   2, 6   0, 4   undefined     (6 is padding)

    ids [num_tokens, k] int, contiguous
    -> (pairs [max_blocks * block_t] int32, the expert of each block [max_blocks] int32, -1 for
    unused ones). Up to 5,120 pairs are sorted in one launch; more in two, of which the first counts
    and the second places.
    """
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
