"""Triton kernels of `experts.py`.

One or two tokens are computed one by one, as matrix-vector products. More tokens run a grouped GEMM
kernel twice. A program of it multiplies a tile of one expert's weights with a block of the tokens
of this expert. Up to `DENSE_TOKENS` tokens the block is all tokens, so nothing is sorted; for more,
`sort_pairs` lists the blocks. Pair p = token * k + choice is the index of an intermediate result,
so nothing is permuted. The last kernel adds up the pairs of each token in order.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import pdl
from .sort_triton import sort_pairs

DENSE_TOKENS = 32  # up to so many, every program looks at all tokens
ONE_TILE = (2, 2048, 4, 2, 512, 2)  # rows, columns and warps of up, then of down


@dataclass(frozen=True)
class GemmConfig:
    """Tile of the grouped GEMM: block_n rows of weights (of gate and of up each, if gated), block_t
    tokens, block_k columns. `tma`: weights are loaded by the tensor memory accelerator."""

    block_n: int
    block_t: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = True


def default_tile(num_tokens: int, top_k: int, num_experts: int) -> tuple[int, ...]:
    """The tile for shapes that were not measured, by the tokens that an expert has on average:
    block_t, then block_n, block_k, warps and stages of up, then those of down."""
    rows = num_tokens * top_k / num_experts
    if num_tokens <= DENSE_TOKENS:
        block_t = 16 if num_tokens <= 16 else 32
    else:
        block_t = 16 if rows <= 8 else 32 if rows <= 16 else 64 if rows <= 56 else 128
    if block_t <= 32:
        return block_t, 64, 128, 4, 4, 64, 128, 4, 4
    if block_t == 64:
        return block_t, 64, 128, 4, 4, 128, 128, 8, 4
    return block_t, 128, 64, 8, 4, 256, 64, 8, 4


def split_tile(tile: tuple[int, ...]) -> tuple[GemmConfig, GemmConfig]:
    """A tile in the order of `default_tile` -> the configs of (up, down), which share block_t."""
    block_t, up_n, up_k, up_warps, up_stages, down_n, down_k, down_warps, down_stages = tile
    up = GemmConfig(up_n, block_t, up_k, up_warps, up_stages)
    return up, GemmConfig(down_n, block_t, down_k, down_warps, down_stages)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _up_one_kernel(
    x, ids, gate_up, out, width, HIDDEN: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of silu(gate) * up for one expert of a token -> out [num_tokens * k, width]."""
    pair = tl.program_id(1)
    x += pair // TOP_K * HIDDEN
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(ids + pair).to(tl.int64)
    inside = rows[:, None] < width
    at = gate_up + expert * (2 * width * HIDDEN) + rows[:, None] * HIDDEN + k[None, :]
    gate = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for begin in tl.static_range(0, HIDDEN, BLOCK_K):
        mask = inside & (begin + k[None, :] < HIDDEN)
        g = tl.load(at + begin, mask=mask, other=0.0)
        u = tl.load(at + begin + width * HIDDEN, mask=mask, other=0.0)
        part = tl.load(x + begin + k, mask=begin + k < HIDDEN, other=0.0).to(tl.float32)[None, :]
        gate += g.to(tl.float32) * part
        up += u.to(tl.float32) * part
    value = _silu(tl.sum(gate, 1)) * tl.sum(up, 1)
    tl.store(out + pair * width + rows, value, mask=rows < width)


@triton.jit
def _down_one_kernel(
    h, ids, weights, down, out, hidden, ADD: tl.constexpr, WIDTH: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of the weighted sum over the experts of a token -> out [num_tokens, hidden].

    Reads the ids before `gdc_wait`. They were written by the kernel before `_up_one_kernel`, which
    had ended when that one passed its own `gdc_wait`, so before this kernel could start.
    """
    token = tl.program_id(1)
    ids += token * TOP_K
    weights += token * TOP_K
    h += token * TOP_K * WIDTH
    out += token * hidden
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = down + rows[:, None] * WIDTH + k[None, :]
    inside = rows[:, None] < hidden
    first = tl.load(ids).to(tl.int64) * hidden * WIDTH
    w = tl.load(at + first, mask=inside & (k[None, :] < WIDTH), other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    old = tl.zeros((BLOCK_N,), tl.float32)
    if ADD:
        old += tl.load(out + rows, mask=rows < hidden, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for pair in tl.static_range(TOP_K):
        expert = at + tl.load(ids + pair).to(tl.int64) * hidden * WIDTH
        score = tl.load(weights + pair)
        for begin in tl.static_range(0, WIDTH, BLOCK_K):
            if pair + begin > 0:
                w = tl.load(expert + begin, mask=inside & (begin + k[None, :] < WIDTH), other=0.0)
            part = tl.load(h + pair * WIDTH + begin + k, mask=begin + k < WIDTH, other=0.0)
            total += w.to(tl.float32) * (part.to(tl.float32) * score)[None, :]
    tl.store(out + rows, old + tl.sum(total, 1), mask=rows < hidden)


@triton.jit
def _weight_tile(
    w, row, end, k, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """w[row : row + BLOCK_N, k : k + BLOCK_K]; rows from `end` on are undefined."""
    if TMA:
        tile = w.load([row, k])
    else:
        rows = row + tl.arange(0, BLOCK_N)
        columns = k + tl.arange(0, BLOCK_K)
        at = w + rows[:, None].to(tl.int64) * K + columns[None, :]
        mask = rows[:, None] < end
        if not EVEN_K:
            mask = mask & (columns[None, :] < K)
        tile = tl.load(at, mask=mask, other=0.0)
    return tile


@triton.jit
def _pairs_of_all(
    ids, block, num_tokens, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr, BY_PAIR: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """-> the expert of a program and, for each token, its pair with that expert or, if there is
    none, the number of pairs.

    Program `block` is for expert `block` or, BY_PAIR (if there are fewer pairs than experts), for
    the expert of pair `block`. Then the program of the expert's first pair does the work of all.
    """
    tokens = tl.arange(0, BLOCK_T)
    columns = tl.arange(0, TOP_K_PAD)[None, :]
    flat = tokens[:, None] * TOP_K + columns
    is_pair = (tokens[:, None] < num_tokens) & (columns < TOP_K)
    choice = tl.load(ids + flat, mask=is_pair, other=-1).to(tl.int32)
    expert = block
    if BY_PAIR:
        expert = tl.load(ids + block).to(tl.int32)
    pairs = tl.min(tl.where(choice == expert, flat, num_tokens * TOP_K), 1)
    if BY_PAIR:
        pairs = tl.where(tl.min(pairs, 0) < block, num_tokens * TOP_K, pairs)
    return expert, pairs


@triton.jit
def _grouped_kernel(
    x, w, out, ids, pair_list, block_experts, num_tokens, n, K, x_stride, tiles,
    TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr, ROW_DIV: tl.constexpr, GATED: tl.constexpr,
    DENSE: tl.constexpr, BY_PAIR: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[p, rows] = w[expert, rows] . x[p // ROW_DIV] for a block of pairs p of one expert and a
    tile of rows. GATED: silu of that, times the same product with the rows n further on. DENSE: the
    block is all tokens."""
    block = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_pairs = num_tokens * TOP_K
    if DENSE:
        expert, pairs = _pairs_of_all(ids, block, num_tokens, TOP_K, TOP_K_PAD, BY_PAIR, BLOCK_T)
        if tl.min(pairs, 0) == num_pairs:
            return
    else:
        expert = tl.load(block_experts + block)
        if expert < 0:
            return
        pairs = tl.load(pair_list + block * BLOCK_T + tl.arange(0, BLOCK_T))
    valid = pairs < num_pairs
    row = tile * BLOCK_N
    base = expert * n
    if GATED:
        base = base * 2
    columns = tl.arange(0, BLOCK_K)
    x_at = x + (pairs // ROW_DIV).to(tl.int64)[:, None] * x_stride + columns[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    acc_up = acc
    for k in range(0, K, BLOCK_K):
        mask = valid[:, None]
        if not EVEN_K:
            mask = mask & (k + columns[None, :] < K)
        part = tl.load(x_at + k, mask=mask, other=0.0).T
        tile_w = _weight_tile(w, base + row, base + n, k, K, BLOCK_N, BLOCK_K, TMA, EVEN_K)
        acc = tl.dot(tile_w, part, acc)
        if GATED:
            tile_w = _weight_tile(
                w, base + n + row, base + 2 * n, k, K, BLOCK_N, BLOCK_K, TMA, EVEN_K
            )
            acc_up = tl.dot(tile_w, part, acc_up)
    if GATED:
        acc = _silu(acc) * acc_up
    rows = row + tl.arange(0, BLOCK_N)
    out_at = out + pairs.to(tl.int64)[:, None] * n + rows[None, :]
    tl.store(out_at, acc.T.to(out.dtype.element_ty), mask=valid[:, None] & (rows[None, :] < n))


@triton.jit
def _combine_kernel(
    parts, weights, out, width, ADD: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over j of weights[t, j] * parts[t * TOP_K + j], in order, in float32. ADD: the
    sum is added to out."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        part = tl.load(parts + pair * width + columns, mask=inside, other=0.0)
        total += tl.load(weights + pair) * part.to(tl.float32)
    at = out + token * width + columns
    if ADD:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total, mask=inside)


@triton.jit
def _silu_mul_kernel(both, out, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(both + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + columns, mask=inside, other=0.0)
    tl.store(out + row * width + columns, _silu(gate) * up.to(tl.float32), mask=inside)


def silu_mul(both: Tensor) -> Tensor:
    """both [num_rows, 2 * width], contiguous, gate first -> silu(gate) * up [num_rows, width]."""
    num_rows, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty(num_rows, width)
    if num_rows:
        grid = (num_rows, triton.cdiv(width, 1024))
        _silu_mul_kernel[grid](both, out, width, BLOCK=1024, num_warps=4, **pdl())
    return out


def moe_one(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    tile: tuple[int, ...],
    out: Tensor,
    add: bool,
) -> Tensor:
    """`moe` of each token by itself, in two launches.

    Arguments as for `moe`, all contiguous; tile: as `ONE_TILE`; out [num_tokens, hidden] receives
    the result or, with `add`, has it added -> out.
    """
    width, hidden = down.shape[2], down.shape[1]
    num_tokens, top_k = ids.shape
    between = x.new_empty(ids.numel(), width)
    rows, columns, warps, down_rows, down_columns, down_warps = tile
    _up_one_kernel[(triton.cdiv(width, rows), ids.numel())](
        x, ids, gate_up, between, width, HIDDEN=hidden, TOP_K=top_k, BLOCK_N=rows,
        BLOCK_K=min(columns, triton.next_power_of_2(hidden)), num_warps=warps, **pdl(),
    )  # fmt: skip
    _down_one_kernel[(triton.cdiv(hidden, down_rows), num_tokens)](
        between, ids, weights, down, out, hidden, ADD=add, WIDTH=width, TOP_K=top_k,
        BLOCK_N=down_rows, BLOCK_K=min(down_columns, triton.next_power_of_2(width)),
        num_warps=down_warps, **pdl(),
    )  # fmt: skip
    return out


def grouped(
    x: Tensor,
    w: Tensor,
    ids: Tensor,
    blocks: tuple[Tensor, Tensor] | None,
    config: GemmConfig,
    gated: bool,
) -> Tensor:
    """Multiply each pair's row of x by the weights of its expert.

    x [num_tokens, columns] if gated (up), else [num_tokens * k, columns] (down)
    w [num_experts, rows, columns], contiguous; ids [num_tokens, k], contiguous
    blocks: the result of `sort_pairs`, or None to look at all tokens in every program
    -> [num_tokens * k, rows or, if gated, rows / 2], of the type of x.
    """
    num_tokens, top_k = ids.shape
    num_experts, rows, columns = w.shape
    n = rows // 2 if gated else rows
    out = x.new_empty(ids.numel(), n)
    tiles = triton.cdiv(n, config.block_n)
    by_pair = ids.numel() < num_experts
    count = (ids.numel() if by_pair else num_experts) if blocks is None else len(blocks[1])
    flat = w.view(num_experts * rows, columns)
    block_k = min(config.block_k, max(16, triton.next_power_of_2(columns)))
    tma = config.tma and columns * w.element_size() % 16 == 0
    weight = TensorDescriptor.from_tensor(flat, [config.block_n, block_k]) if tma else flat
    _grouped_kernel[(count * tiles,)](
        x, weight, out, ids, blocks[0] if blocks else ids, blocks[1] if blocks else ids,
        num_tokens, n, columns, x.stride(0), tiles, TOP_K=top_k,
        TOP_K_PAD=triton.next_power_of_2(top_k), ROW_DIV=top_k if gated else 1, GATED=gated,
        DENSE=blocks is None, BY_PAIR=by_pair, EVEN_K=columns % block_k == 0, TMA=tma,
        BLOCK_N=config.block_n, BLOCK_T=config.block_t, BLOCK_K=block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, **pdl(),
    )  # fmt: skip
    return out


def combine(parts: Tensor, weights: Tensor, out: Tensor, add: bool) -> Tensor:
    """Weighted sum over the pairs of each token.

    parts [num_tokens * k, hidden], weights [num_tokens, k] float32, contiguous; out [num_tokens,
    hidden], contiguous, receives the sum or, with `add`, has it added -> out.
    """
    num_tokens, top_k = weights.shape
    hidden = parts.shape[1]
    block = min(1024, triton.next_power_of_2(hidden))
    grid = (num_tokens, triton.cdiv(hidden, block))
    _combine_kernel[grid](
        parts, weights, out, hidden, ADD=add, TOP_K=top_k, BLOCK=block, num_warps=4, **pdl()
    )
    return out


def moe_grouped(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    configs: tuple[GemmConfig, GemmConfig],
    out: Tensor,
    add: bool,
) -> Tensor:
    """`moe` by the grouped GEMM: sort unless the tokens are few, up, down, combine.

    Arguments as for `moe`, all contiguous; configs: of (up, down); out [num_tokens, hidden]
    receives the result or, with `add`, has it added -> out.
    """
    up_config, down_config = configs
    blocks = None
    if len(x) > min(DENSE_TOKENS, up_config.block_t):
        blocks = sort_pairs(ids, len(gate_up), up_config.block_t)
    between = grouped(x, gate_up, ids, blocks, up_config, gated=True)
    parts = grouped(between, down, ids, blocks, down_config, gated=False)
    return combine(parts, weights, out, add)
