"""RMS normalisation.

Statistics are float32 whatever the input type; the weight multiplies after rounding back, as the
model was trained. On CUDA one launch; for a single token what reads the norm computes it along:
`linear.norm_linear`, `router.norm_route`.
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
    return launch_rms_norm(rows, weight, eps).view(x.shape)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
