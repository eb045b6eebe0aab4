"""RMS normalisation.

Statistics are float32 whatever the input type. The result is rounded to that type before the weight
multiplies it, as the model was trained. On CUDA one launch. For few tokens the op that reads the
norm computes it as well: `norm_linear` and `norm_route`. Formula: https://arxiv.org/abs/1910.07467.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x ** 2) + eps), over the last dimension.

    x [..., width], strided over all but the last dimension; weight [width]; of one float type
    -> the shape and type of x, contiguous.
    """
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
