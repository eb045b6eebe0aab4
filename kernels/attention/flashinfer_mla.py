"""FlashInfer's absorbed MLA decode, an alternative to `mla_decode.py`: one query per row.

It divides a step's work on the host, from lengths that the host knows, and its kernel reads that
division from the device. So `plan` is called before every step, and `run` in every layer; a CUDA
graph that captured `run` follows later plans.
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
_DIMS = (512, 64)  # value and rotary width that it has a kernel for


class FlashInferDecode:
    """Attention of one new token per row over the row's pages.

    page_table [rows, pages] int32, contiguous: of all rows there may be, read when `run` runs
    """

    def __init__(self, page_table: Tensor, page_size: int, num_heads: int, scale: float) -> None:
        mla: Any = import_module("flashinfer.mla")
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=page_table.device)
        self._num_rows, self._row_pages = page_table.shape
        # Its host copies of what is planned; the kernel reads the page table itself.
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
        """The next runs' queries are of these rows, one each, with so many tokens, theirs
        included. Waits until the last plan was copied to the device."""
        unused = self._num_rows - len(rows)
        starts = [*range(len(rows)), *[len(rows)] * (unused + 1)]
        pages = [*(row * self._row_pages for row in rows), *[0] * (unused + 1)]
        host = [torch.tensor(part, dtype=torch.int32) for part in (starts, pages)]
        counts = torch.tensor([*lengths, *[0] * unused], dtype=torch.int32)
        self._copied.synchronize()
        self._wrapper.plan(*host, self._no_pages, counts, *self._settings, dtype, dtype)
        self._copied.record()

    def run(self, queries: Tensor, kv: Tensor) -> Tensor:
        """queries [len(rows), num_heads, latent_dim], kv [num_pages, page_size, latent_dim], new
        tokens written -> [len(rows), num_heads, value_dim], as `mla_decode`."""
        value = _DIMS[0]
        out = queries.new_empty(*queries.shape[:2], value)
        parts = (queries[..., :value], queries[..., value:], kv[..., :value], kv[..., value:])
        self._wrapper.run(*parts, out=out)
        return out


def flashinfer_decode(
    asked: str, page_table: Tensor, page_size: int, queries: Tensor, value_dim: int, scale: float
) -> FlashInferDecode | None:
    """What plans and runs decode steps if `asked` is flashinfer; queries [tokens, heads, dim] are
    like those there will be. None for other backends and for what FlashInfer has no kernel for,
    which the log then says. Raises ValueError if it is not installed."""
    if asked != "flashinfer":
        return None
    dims = (value_dim, queries.shape[2] - value_dim)
    if queries.dtype != torch.bfloat16 or dims != _DIMS or not is_hopper(queries.device):
        found = decode_backend("auto", queries)
        logger.warning("FlashInfer has no decode kernel for this model or card: %s decodes", found)
        return None
    decode_backend(asked, queries)
    return FlashInferDecode(page_table, page_size, queries.shape[1], scale)
