"""Triton kernel of `rms_norm`: one program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import pdl


@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, width, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    wide = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    rounded = wide.to(out.dtype.element_ty).to(tl.float32)  # before the weight, as trained
    tl.store(out + row * width + columns, rounded * scale.to(tl.float32), mask=inside)


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Arguments as for `rms_norm`, with x [num_rows, width]."""
    num_rows, width = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_rows:
        block = triton.next_power_of_2(width)
        _rms_norm_kernel[(num_rows,)](
            x, weight, out, x.stride(0), width, eps, BLOCK=block,
            num_warps=min(8, max(1, block // 512)), **pdl(),
        )  # fmt: skip
    return out
