"""Rotary position embedding, for weights laid out in neighbouring pairs or in halves.

The rotated vector keeps its layout: queries and cached keys agree, nothing else reads them.
"""

from functools import cache

import torch
from torch import Tensor


def rope_angles(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions [num_tokens] int64 -> (cos, sin), each [num_tokens, dim / 2] float32."""
    angles = positions.float()[:, None] * _frequencies(dim, theta, positions.device)
    return angles.cos(), angles.sin()


@cache
def _frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """[dim / 2] float32, in radians per token."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / theta**exponents


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """Rotate x [num_tokens, ..., dim] by its token's angles; float32 inside, x's type outside.

    `interleave`: pair i is (x[2i], x[2i+1]); otherwise (x[i], x[i + dim/2]).
    """
    shape = (x.shape[0], *(1,) * (x.dim() - 2), cos.shape[-1])
    cos, sin = cos.view(shape), sin.view(shape)
    wide = x.float()
    if interleave:
        first, second = wide[..., 0::2], wide[..., 1::2]
        pairs = (first * cos - second * sin, second * cos + first * sin)
        return torch.stack(pairs, dim=-1).flatten(-2).to(x.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
