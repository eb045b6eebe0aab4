"""Triton kernel of `logprobs`: ranks and likeliest tokens, without the log-probabilities of all."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling_triton import load_logits, scan

MOST_TOP = 32  # each costs another pass over all logits, in registers
_LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _likeliest_kernel(
    logits, ids, above, top, top_ids, stride, width, num_chunks, num_top,
    CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of one chunk: how many logits are larger than that of the chosen token, and the num_top
    largest ones with their ids, of equal ones the lowest id. A banned token (-inf) counts as
    `_LEAST`, a token that is stored already as -inf."""
    chunk, at = tl.program_id(0), tl.program_id(1)
    token_ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits, at, stride, token_ids, width, GROUP)
    chosen = tl.load(logits + at.to(tl.int64) * stride + tl.load(ids + at))
    out = at * num_chunks + chunk
    tl.store(above + out, tl.sum((x > chosen).to(tl.int32), 0))
    x = tl.where(token_ids < width, tl.maximum(x, _LEAST), float("-inf"))
    for i in range(num_top):
        largest = tl.max(x, 0)
        token_id = tl.min(tl.where(x == largest, token_ids, width - 1), 0)
        tl.store(top + out * num_top + i, largest)
        tl.store(top_ids + out * num_top + i, token_id)
        x = tl.where(token_ids == token_id, float("-inf"), x)


def launch_logprobs(
    logits: Tensor, ids: Tensor, temperature: Tensor, num_top: int, chunk: int = 4096
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments as for `logprobs`, with at least one row and num_top <= MOST_TOP."""
    num_rows = len(logits)
    scale = torch.where(temperature > 0, temperature, 1)
    scanned = scan(logits, torch.arange(num_rows, device=logits.device), scale, chunk)
    stride, width, num_chunks, group = scanned.shape
    above = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
    top = torch.empty(num_rows, num_chunks * num_top, device=logits.device)
    top_ids = torch.empty_like(top, dtype=torch.int32)
    _likeliest_kernel[(num_chunks, num_rows)](
        logits, ids, above, top, top_ids, stride, width, num_chunks, num_top,
        CHUNK=chunk, GROUP=group, num_warps=8,
    )  # fmt: skip
    peak = scanned.peaks.amax(1, keepdim=True)
    scale = scale[:, None]
    parts = scanned.sums * ((scanned.peaks - peak) / scale).double().exp()
    total = parts.sum(1, keepdim=True).log().float()
    chosen = (logits.gather(1, ids[:, None]) - peak) / scale - total
    # The sort is stable, and equal candidates are in the order of their ids.
    top, order = top.sort(dim=1, descending=True, stable=True)
    top, order = top[:, :num_top], order[:, :num_top]
    top = top.masked_fill(top == _LEAST.value, -torch.inf)
    top_ids = top_ids.gather(1, order).long()
    return chosen.squeeze(1), above.sum(1) + 1, top_ids, (top - peak) / scale - total
