"""RMS normalisation, alone and fused with the residual add before it.

Statistics are float32 whatever the input type; the weight multiplies after rounding back, as the
model was trained. On CUDA each is one launch.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., width] with neighbouring elements in a row, rows may be strided; weight [width], both
    of one float type -> the same shape and type, contiguous."""
    if not x.is_cuda:
        return rms_norm_reference(x, weight, eps)
    from .rms_norm_triton import launch_rms_norm

    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return launch_rms_norm(rows, None, weight, eps)[0].view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x and residual [num_tokens, width], one type."""
    if not x.is_cuda:
        residual = residual + x
        return rms_norm_reference(residual, weight, eps), residual
    from .rms_norm_triton import launch_rms_norm

    normed, total = launch_rms_norm(x, residual, weight, eps)
    return normed, total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
