"""RMS normalisation, alone and fused with the residual add before it.

Statistics are float32 whatever the input type; the weight multiplies after rounding back, as the
model was trained.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., width], weight [width], both of one float type -> the same shape and type."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x and residual [num_tokens, width], one type."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual
