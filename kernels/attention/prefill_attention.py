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
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal: rows of `row_lens` tokens, one after another, each within itself; `starts`
    [num_rows + 1] int on the device may be None for a single row. Otherwise: one row, every query
    sees every key.

    queries [num_queries, heads, dim], keys [num_keys, heads, dim], values [num_keys, heads, v_dim],
    strided over all but the last dimension; backend: fa3, flashinfer or triton
    -> (output [num_queries, heads, v_dim] of queries' type, log-sum-exp [heads, num_queries]
    float32, natural). The output is in `out`, contiguous, if that is given and the backend can.
    """
    if backend == "fa3":
        return _fa3(queries, keys, values, starts, row_lens, causal, scale, out)
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
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    module = fa3_module()
    operator = getattr(module, "fa3_fwd_cuda", None)
    bounds, longest = None, max(row_lens)
    if starts is not None and len(row_lens) > 1:
        bounds = starts.to(torch.int32)
    if operator is not None:
        return _fa3_operator(
            operator.fwd, queries, keys, values, bounds, longest, causal, scale, out
        )
    options = {"softmax_scale": scale, "causal": causal, "return_attn_probs": True}
    if bounds is None:
        output, lse = module.flash_attn_func(queries[None], keys[None], values[None], **options)
        return output[0], lse[0]
    function = module.flash_attn_varlen_func
    output, lse = function(queries, keys, values, bounds, bounds, longest, longest, **options)
    return output, lse


def _fa3_operator(
    forward: Callable[..., Any],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bounds: Tensor | None,
    longest: int,
    causal: bool,
    scale: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The fa3-fwd wheel's operator itself. Its functions are for training as well: on the way they
    make tensors that nobody reads, and copy what they could have written in place."""
    parts = [queries, keys, values, None, None, None, out]  # k_new, v_new, qv
    if bounds is None:
        parts = [part if part is None else part[None] for part in parts]
    unused = [None] * 3  # of cu_seqlens_k_new, seqused_q and seqused_k
    lengths = [longest, longest] if bounds is not None else [None, None]
    # page table, its batch indices, left padding, three of rope, three scales of 8-bit types
    settings = [*[None] * 9, scale, causal, -1, -1, 0, 0.0, True, None, 1, None, 0]
    output, lse, *_ = forward(*parts, bounds, bounds, *unused, *lengths, *settings)
    return (output, lse) if bounds is not None else (output[0], lse[0])


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
