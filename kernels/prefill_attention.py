"""Attention of packed rows with their own keys and values per head, by the backend asked for.

Every backend also gives the log-sum-exp of the scores, so that parts of a long context merge.
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


def attend_rows(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor | None,
    row_lens: tuple[int, ...],
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Causal: rows of `row_lens` tokens, one after another, each within itself; `starts`
    [num_rows + 1] int on the device may be None for a single row. Otherwise: one row, every query
    sees every key.

    queries [num_queries, heads, dim], keys [num_keys, heads, dim], values [num_keys, heads, v_dim],
    strided over all but the last dimension; backend: fa3, flashinfer or triton
    -> (output [num_queries, heads, v_dim] of queries' type, log-sum-exp [heads, num_queries]
    float32, natural).
    """
    if backend == "fa3":
        return _fa3(queries, keys, values, starts, row_lens, causal, scale)
    if backend == "flashinfer":
        return _flashinfer(queries, keys, values, row_lens, causal, scale)
    from .prefill_attention_triton import launch_attend_rows

    longest = max(row_lens)
    return launch_attend_rows(queries, keys, values, starts, longest, causal, scale)


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
    row_lens: tuple[int, ...],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    options = {"softmax_scale": scale, "causal": causal, "return_attn_probs": True}
    if starts is None or len(row_lens) == 1:
        function = fa3_module().flash_attn_func
        out, lse = function(queries[None], keys[None], values[None], **options)
        return out[0], lse[0]
    bounds = starts.to(torch.int32)
    longest = max(row_lens)
    function = fa3_module().flash_attn_varlen_func
    out, lse = function(queries, keys, values, bounds, bounds, longest, longest, **options)
    return out, lse


@dataclass
class _FlashInfer:
    """FlashInfer's wrapper, what it was last planned for (layers of a step share a plan), and
    whether that plan has left its pinned buffer, which the next one is written to."""

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
    row_lens: tuple[int, ...],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    state = _flashinfer_state(queries.device, causal)
    key_lens = row_lens if causal else (len(keys),)
    shape = (row_lens, key_lens, queries.shape[1:], values.shape[2], queries.dtype, scale)
    if state.planned != shape:
        indptr = [torch.tensor((0, *lens)).cumsum(0).int() for lens in (row_lens, key_lens)]
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
    out, lse = run(queries, keys, values.contiguous(), return_lse=True)
    return out, lse.t().contiguous() * 0.6931471805599453  # theirs is to the base 2
