"""Matrix product with a weight, for layers whose time is that of reading the weight."""

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

_FEW_TOKENS = 32  # more are the library's
_FEW_ROWS = 2048  # of the weight, and not more than columns; the library is better at wide ones


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [num_tokens, k], rows may be strided, times weight [n, k] transposed, one float type
    -> [num_tokens, n].

    On CUDA one token is a matrix-vector kernel, few tokens and a deep weight a tensor-core kernel,
    anything else cuBLAS; the first two give each row the same result whatever the others are.
    """
    num_tokens = len(x)
    if not x.is_cuda or x.dtype == torch.float32 or num_tokens == 0:
        return torch_linear(x, weight)
    if num_tokens == 1:
        from .linear_triton import linear_one, one_tile

        return linear_one(x, weight, one_tile(*weight.shape))
    if num_tokens <= _FEW_TOKENS and len(weight) <= min(_FEW_ROWS, weight.shape[1]):
        from .linear_triton import few_tile, linear_few

        return linear_few(x, weight, few_tile(*weight.shape))
    return torch_linear(x, weight)
