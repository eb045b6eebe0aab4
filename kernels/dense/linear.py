"""RMS normalisation, and the matrix product with a weight that mostly follows it.

Statistics of the norm are float32 whatever the input type. Its result is rounded to that type
before the weight multiplies it, as the model was trained. Formula:
https://arxiv.org/abs/1910.07467. For few tokens on CUDA, the op that reads the norm computes it as
well: `norm_linear` and `norm_route`. Products are for layers whose time is the time to read the
weight.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from ..tiles import choose

FEW_TOKENS = 32  # more are left to cuBLAS
# Up to so many tokens, `norm_linear` computes each token by itself, with its norm. On an H200 the
# down-projection of two tokens took 3.6 us this way and 5.8 us as a norm and a product of both; of
# four tokens 6.3 and 5.8.
NORM_TOKENS = 3


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x ** 2) + eps), over the last dimension; on CUDA one launch.

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


def linear(
    x: Tensor, weight: Tensor, out: Tensor | None = None, add_to: Tensor | None = None
) -> Tensor:
    """x times the transposed weight.

    x [num_tokens, k], rows may be strided; weight [n, k], contiguous
    out [num_tokens, n], contiguous: if given, receives the product
    add_to [num_tokens, n], contiguous: if given, the product is added to it in place
    All of one float type -> [num_tokens, n]: `out`, `add_to` or a new tensor; float32 sums.

    On CUDA one token is computed by a matrix-vector kernel, few tokens by a tensor-core kernel
    where that is faster, and the rest by cuBLAS. With the first two, the result of a row does not
    depend on the other rows.
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
    """`linear` of the RMS norm of x with weight `norm` [k] and epsilon `eps`: one launch for few
    tokens on CUDA. Other arguments as for `linear`."""
    if not x.is_cuda or x.dtype == torch.float32 or not 0 < len(x) <= NORM_TOKENS:
        return linear(rms_norm(x, norm, eps), weight, out)
    from .linear_triton import linear_one, norm_tile

    return linear_one(x, weight, norm_tile(weight.shape[1]), out, norm=norm, eps=eps)


def _library(x: Tensor, weight: Tensor, out: Tensor | None, add_to: Tensor | None) -> Tensor:
    if add_to is not None:
        return add_to.addmm_(x, weight.T) if x.is_cuda else add_to.add_(torch_linear(x, weight))
    return torch_linear(x, weight) if out is None else torch.mm(x, weight.T, out=out)
