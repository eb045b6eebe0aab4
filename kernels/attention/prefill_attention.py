"""Attention of packed rows over keys and values per head, by one of several backends.

Every backend also returns the log-sum-exp of the scores, so that the parts of a long context can be
merged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
FA3_HEAD_DIMS = (64, 96, 128, 192, 256)
_WORKSPACE = 128 << 20  # bytes that FlashInfer wants for its partial results
_LN_2 = 0.6931471805599453


def attend_rows(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor | None,
    row_lens: tuple[int, ...] | None,
    scale: float,
    backend: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within each row or, without `row_lens`, of all queries over all keys.

    queries [num_queries, heads, dim], keys [num_keys, heads, dim], values [num_keys, heads, v_dim],
        of one 16-bit type, strided over all but the last dimension
    row_lens: tokens of each row, the rows packed one after another; then num_keys = num_queries
    starts [num_rows + 1] int64 on the device: the first token of each row, then the end; may be
        None for a single row
    backend: "fa3", "flashinfer" or "triton"
    out [num_queries, heads, v_dim], contiguous: FA3 writes its output there
    -> (output [num_queries, heads, v_dim] of the type of queries, log-sum-exp [heads, num_queries]
    float32, natural logarithm).
    """
    if backend == "fa3":
        return _fa3(queries, keys, values, starts, row_lens, scale, out)
    if backend == "flashinfer":
        return _flashinfer(queries, keys, values, row_lens, scale)
    from .prefill_attention_triton import launch_attend_rows

    longest = len(queries) if row_lens is None else max(row_lens)
    return launch_attend_rows(queries, keys, values, starts, longest, row_lens is not None, scale)


@cache
def fa3_module() -> Any:
    """The installed FlashAttention 3; ImportError if there is none."""
    for name in FA3_MODULES:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise ImportError(f"none of {', '.join(FA3_MODULES)} is installed")


def _fa3(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor | None,
    row_lens: tuple[int, ...] | None,
    scale: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    module = fa3_module()
    causal = row_lens is not None
    longest = len(queries) if row_lens is None else max(row_lens)
    bounds = None
    if starts is not None and row_lens is not None and len(row_lens) > 1:
        bounds = starts.to(torch.int32)
    if hasattr(module, "fa3_fwd_cuda"):
        return _fa3_operator(queries, keys, values, bounds, longest, causal, scale, out)
    options = {"softmax_scale": scale, "causal": causal, "return_attn_probs": True}
    if bounds is None:
        output, lse = module.flash_attn_func(queries[None], keys[None], values[None], **options)
        return output[0], lse[0]
    function = module.flash_attn_varlen_func
    output, lse = function(queries, keys, values, bounds, bounds, longest, longest, **options)
    return output, lse


def _fa3_operator(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bounds: Tensor | None,
    longest: int,
    causal: bool,
    scale: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operator of the fa3-fwd wheel. The wheel's Python functions also serve training: they
    allocate tensors that inference does not read and copy instead of writing in place."""
    parts = [queries, keys, values, None, None, None, out]  # k_new, v_new, qv
    if bounds is None:
        parts = [part if part is None else part[None] for part in parts]
    unused = [None] * 3  # cu_seqlens_k_new, seqused_q and seqused_k
    lengths = [longest, longest] if bounds is not None else [None, None]
    # page table, its batch indices, left padding, three of rope, three scales of 8-bit types
    settings = [*[None] * 9, scale, causal, -1, -1, 0, 0.0, True, None, 1, None, 0]
    forward = fa3_module().fa3_fwd_cuda.fwd
    output, lse, *_ = forward(*parts, bounds, bounds, *unused, *lengths, *settings)
    return (output, lse) if bounds is not None else (output[0], lse[0])


@dataclass
class _FlashInfer:
    """FlashInfer's wrapper and the arguments of its last plan, which the layers of a step share.

    `copied` is recorded after a plan. The next plan waits for it before it overwrites the pinned
    buffer from which the last one is copied to the device.
    """

    wrapper: Any
    copied: torch.cuda.Event
    planned: object = None


@cache
def _flashinfer_state(device: torch.device, causal: bool) -> _FlashInfer:
    prefill: Any = import_module("flashinfer.prefill")
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    return _FlashInfer(wrapper, torch.cuda.Event())


def _flashinfer(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    row_lens: tuple[int, ...] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    causal = row_lens is not None
    state = _flashinfer_state(queries.device, causal)
    query_lens = (len(queries),) if row_lens is None else row_lens
    key_lens = (len(keys),) if row_lens is None else row_lens
    shape = (query_lens, key_lens, queries.shape[1:], values.shape[2], queries.dtype, scale)
    if state.planned != shape:
        indptr = [torch.tensor((0, *lens)).cumsum(0).int() for lens in (query_lens, key_lens)]
        state.copied.synchronize()
        state.wrapper.plan(
            *indptr,
            queries.shape[1],
            keys.shape[1],
            queries.shape[2],
            head_dim_vo=values.shape[2],
            causal=causal,
            sm_scale=scale,
            q_data_type=queries.dtype,
            kv_data_type=keys.dtype,
        )
        state.copied.record()
        state.planned = shape
    run: Callable[..., tuple[Tensor, Tensor]] = state.wrapper.run
    output, lse = run(queries, keys, values.contiguous(), return_lse=True)
    return output, lse.t().contiguous() * _LN_2  # FlashInfer's logarithm is to the base 2
