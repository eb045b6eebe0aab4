"""Chooses the attention implementation: which backend runs for the one that a user asked for."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .prefill_attention import FA3_HEAD_DIMS, FA3_MODULES

_HOPPER = 9
_WIDTH_STEP = 8  # kernels take head widths that are multiples of it


def prefill_backend(asked: str, queries: Tensor, value_dim: int) -> str:
    """The backend of `mla_prefill` for queries [..., heads, dim] and values of width value_dim.

    asked: "auto", "torch", "triton", "fa3", "flashinfer", or "flashqla", which means "auto"
    -> "torch", "triton", "fa3" or "flashinfer". "auto" is FlashAttention 3 where it is installed
    and has a kernel, else "triton". CPUs, 32-bit types and head widths that are no multiple of 8
    have only the reference, "torch". Raises ValueError if the backend asked for is not installed.
    """
    # No published model has other widths. With 20 and 10 the Triton kernel read out of bounds on an
    # H100.
    is_odd_width = queries.shape[-1] % _WIDTH_STEP or value_dim % _WIDTH_STEP
    if not _is_accelerated(queries) or asked == "torch" or is_odd_width:
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
    """The backend of `mla_decode` for queries [..., heads, dim].

    asked: "torch", "auto", "triton", "fa3" or "flashinfer" -> "torch" or "triton". CPUs and 32-bit
    types have only the reference, "torch". FlashInfer's decode is not among the results: it is
    planned before a step (`flashinfer_mla.py`), and steps that it cannot plan run "triton". Raises
    ValueError if FlashInfer is asked for and not installed.
    """
    if not _is_accelerated(queries) or asked == "torch":
        return "torch"
    if asked == "flashinfer":
        _installed(asked)
    return "triton"


def _is_accelerated(queries: Tensor) -> bool:
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
    """Whether a device is a Hopper GPU, for which FlashAttention 3 and the Gluon kernel are."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER
