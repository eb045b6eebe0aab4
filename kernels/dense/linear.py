"""Matrix product with a weight, for layers whose time is that of reading the weight."""

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from ..tiles import choose
from .rms_norm import rms_norm

FEW_TOKENS = 32  # more are the library's
# So many tokens are as many products with their norms. On an H200 the down-projection of two took
# 3.6 us so and 5.8 as a norm and a product of both; of four 6.3 and 5.8.
NORM_TOKENS = 3


def linear(
    x: Tensor, weight: Tensor, out: Tensor | None = None, add_to: Tensor | None = None
) -> Tensor:
    """x [num_tokens, k], rows may be strided, times weight [n, k] transposed, one float type
    -> [num_tokens, n]: `out` if given, or `add_to` (contiguous), which the product is added to.

    On CUDA one token is a matrix-vector kernel, few tokens a tensor-core kernel where that is the
    faster, anything else cuBLAS; the first two give each row the same result whatever the others
    are.
    """
    num_tokens = len(x)
    if not x.is_cuda or x.dtype == torch.float32 or not 0 < num_tokens <= FEW_TOKENS:
        return _library(x, weight, out, add_to)
    from .linear_triton import few_tile, linear_few, linear_one, one_tile

    n, k_size = weight.shape
    if num_tokens == 1:
        tile = choose("linear_one", (n, k_size), 1, one_tile(k_size))
        return linear_one(x, weight, tile, out, add_to)
    tile = choose("linear_few", (n, k_size), num_tokens, few_tile(n, k_size))
    if not tile:
        return _library(x, weight, out, add_to)
    return linear_few(x, weight, tile, out, add_to)


def norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, out: Tensor | None = None
) -> Tensor:
    """`linear` of the RMS norm of x with weight `norm` [k]; on CUDA one launch for few tokens."""
    if not x.is_cuda or x.dtype == torch.float32 or not 0 < len(x) <= NORM_TOKENS:
        return linear(rms_norm(x, norm, eps), weight, out)
    from .linear_triton import linear_one, norm_tile

    return linear_one(x, weight, norm_tile(weight.shape[1]), out, norm=norm, eps=eps)


def _library(x: Tensor, weight: Tensor, out: Tensor | None, add_to: Tensor | None) -> Tensor:
    if add_to is not None:
        return add_to.addmm_(x, weight.T) if x.is_cuda else add_to.add_(torch_linear(x, weight))
    return torch_linear(x, weight) if out is None else torch.mm(x, weight.T, out=out)
