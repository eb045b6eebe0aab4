"""Which implementation computes attention: names that users give become ones that ops know."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .prefill_attention import FA3_HEAD_DIMS, FA3_MODULES

_HOPPER = 9
_WIDTH_STEP = 8  # widths of heads that kernels take are multiples of it


def prefill_backend(asked: str, queries: Tensor, value_dim: int) -> str:
    """asked: auto, torch, triton, fa3, flashinfer, or flashqla, which means auto
    -> torch, triton, fa3 or flashinfer, for queries [..., heads, dim] and values of value_dim.

    auto is FlashAttention 3 where it is installed and has a kernel, else triton. 32-bit types,
    heads of odd widths and CPUs have the reference alone. Raises ValueError if what was asked for
    is not installed.
    """
    # Heads of odd widths, which no published model has, are left to the reference: at 20 and 10 the
    # Triton kernel read what it must not on an H100.
    is_odd = queries.shape[-1] % _WIDTH_STEP or value_dim % _WIDTH_STEP
    if not _accelerated(queries) or asked == "torch" or is_odd:
        return "torch"
    if asked in ("triton", "flashinfer"):
        return _installed(asked)
    fits = queries.shape[-1] == value_dim in FA3_HEAD_DIMS and is_hopper(queries.device)
    if queries.dtype != torch.bfloat16 or not fits:
        return "triton"
    if asked == "fa3":
        return _installed(asked)
    return "fa3" if _is_installed("fa3") else "triton"


def decode_backend(asked: str, queries: Tensor) -> str:
    """asked: torch, or auto, triton, fa3 or flashinfer -> torch or triton; 32-bit types and CPUs
    have the reference alone. FlashInfer's decode is planned before a step (`flashinfer_mla.py`);
    steps that it cannot plan run the paged kernels, as with the others. Raises ValueError if it
    was asked for and is not installed."""
    if not _accelerated(queries) or asked == "torch":
        return "torch"
    if asked == "flashinfer":
        _installed(asked)
    return "triton"


def _accelerated(queries: Tensor) -> bool:
    return queries.is_cuda and queries.dtype in (torch.bfloat16, torch.float16)


def _installed(backend: str) -> str:
    if not _is_installed(backend):
        package = {"fa3": "fa3-fwd", "flashinfer": "flashinfer-python"}.get(backend, backend)
        raise ValueError(
            f"attention backend {backend} is not installed: pip install {package}, or use auto"
        )
    return backend


@cache
def _is_installed(backend: str) -> bool:
    modules = FA3_MODULES if backend == "fa3" else (backend,)
    return any(find_spec(module) is not None for module in modules)


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is a card that FlashAttention 3's kernels are for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER
