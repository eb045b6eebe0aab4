"""FlashInfer's absorbed MLA decode, an alternative to `mla_decode.py` for one query per row.

FlashInfer divides the work of a step on the host, which must know all lengths, and copies the
division to the device, where its kernel reads it. So `plan` is called before every step and `run`
in every layer. A CUDA graph that captured `run` follows later plans.
"""

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .backends import decode_backend, is_hopper

logger = logging.getLogger(__name__)
_WORKSPACE = 32 << 20  # bytes; partial results of 132 multiprocessors take 17 MB
_DIMS = (512, 64)  # the value and rotary width that FlashInfer has a kernel for


class FlashInferDecode:
    """Attention of one new token per row over the pages of the row.

    page_table [rows, pages] int32, contiguous: of all rows that can exist. The kernel reads it when
    `run` runs, so its contents may change.
    """

    def __init__(self, page_table: Tensor, page_size: int, num_heads: int, scale: float) -> None:
        mla: Any = import_module("flashinfer.mla")
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=page_table.device)
        self._num_rows, self._row_pages = page_table.shape
        # The wrapper keeps query starts, page starts and lengths in buffers on the host. Its kernel
        # reads the page table itself.
        ends = torch.empty(2, self._num_rows + 1, dtype=torch.int32)
        lengths = torch.empty(self._num_rows, dtype=torch.int32)
        pages = page_table.view(-1)
        self._wrapper = mla.BatchMLAPagedAttentionWrapper(
            workspace, True, ends[0], ends[1], pages, lengths, backend="fa3"
        )
        self._no_pages = pages[:0]
        self._settings = (num_heads, *_DIMS, page_size, False, scale)
        self._copied = torch.cuda.Event()

    def plan(self, rows: Sequence[int], lengths: Sequence[int], dtype: torch.dtype) -> None:
        """Plan the next runs: query i is of row rows[i], which has lengths[i] tokens, the new one
        included. Waits until the last plan has been copied to the device."""
        unused = self._num_rows - len(rows)
        starts = [*range(len(rows)), *[len(rows)] * (unused + 1)]
        pages = [*(row * self._row_pages for row in rows), *[0] * (unused + 1)]
        host = [torch.tensor(part, dtype=torch.int32) for part in (starts, pages)]
        counts = torch.tensor([*lengths, *[0] * unused], dtype=torch.int32)
        self._copied.synchronize()
        self._wrapper.plan(*host, self._no_pages, counts, *self._settings, dtype, dtype)
        self._copied.record()

    def run(self, queries: Tensor, kv: Tensor) -> Tensor:
        """Attention of the planned rows -> [len(rows), num_heads, value_dim], contiguous.

        queries [len(rows), num_heads, latent_dim]; kv [num_pages, page_size, latent_dim], which
        already holds the latents of the new tokens; both bfloat16.
        """
        value = _DIMS[0]
        out = queries.new_empty(*queries.shape[:2], value)
        parts = (queries[..., :value], queries[..., value:], kv[..., :value], kv[..., value:])
        self._wrapper.run(*parts, out=out)
        return out


def flashinfer_decode(
    asked: str, page_table: Tensor, page_size: int, queries: Tensor, value_dim: int, scale: float
) -> FlashInferDecode | None:
    """A `FlashInferDecode` if `asked` is "flashinfer", else None.

    queries [num_tokens, heads, latent_dim]: a sample with the type, device and widths of later
    ones. Returns None and logs a warning if FlashInfer has no kernel for them. Raises ValueError if
    it is not installed.
    """
    if asked != "flashinfer":
        return None
    dims = (value_dim, queries.shape[2] - value_dim)
    if queries.dtype != torch.bfloat16 or dims != _DIMS or not is_hopper(queries.device):
        used = decode_backend("auto", queries)
        logger.warning("FlashInfer has no decode kernel for this model or card: %s decodes", used)
        return None
    decode_backend(asked, queries)
    return FlashInferDecode(page_table, page_size, queries.shape[1], scale)
