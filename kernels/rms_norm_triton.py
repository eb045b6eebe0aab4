"""Triton kernel of `rms_norm.py`: one program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import pdl


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    x_stride,
    residual_stride,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    if ADD:
        old = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + old.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * width + columns, value, mask=inside)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    rounded = wide.to(out.dtype.element_ty).to(tl.float32)  # before the weight, as in training
    tl.store(out + row * width + columns, rounded * scale.to(tl.float32), mask=inside)


def launch_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    """x [num_rows, width], rows may be strided, residual the same or None -> [normed] or
    [normed, x + residual], contiguous."""
    num_rows, width = x.shape
    outputs = [torch.empty_like(x, memory_format=torch.contiguous_format)]
    if residual is not None:
        outputs.append(torch.empty_like(outputs[0]))
    if not num_rows:
        return outputs
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(num_rows,)](
        x,
        residual if residual is not None else x,
        weight,
        outputs[0],
        outputs[-1],
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        width,
        eps,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
        **pdl(),
    )
    return outputs
