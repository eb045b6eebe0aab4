"""Matrix product with a weight, for layers whose time is that of reading the weight."""

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from .choices import choose

FEW_TOKENS = 32  # more are the library's


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [num_tokens, k], rows may be strided, times weight [n, k] transposed, one float type
    -> [num_tokens, n], in `out` if given.

    On CUDA one token is a matrix-vector kernel, few tokens a tensor-core kernel where that is the
    faster, anything else cuBLAS; the first two give each row the same result whatever the others
    are.
    """
    num_tokens = len(x)
    if not x.is_cuda or x.dtype == torch.float32 or not 0 < num_tokens <= FEW_TOKENS:
        return _library(x, weight, out)
    from .linear_triton import few_tile, linear_few, linear_one, one_tile

    n, k_size = weight.shape
    if num_tokens == 1:
        return linear_one(x, weight, choose("linear_one", (n, k_size), 1, one_tile(k_size)), out)
    tile = choose("linear_few", (n, k_size), num_tokens, few_tile(n, k_size))
    return linear_few(x, weight, tile, out) if tile else _library(x, weight, out)


def _library(x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    return torch_linear(x, weight) if out is None else torch.mm(x, weight.T, out=out)
