"""The KV pages of one rank: one tensor, sized once. The scheduler decides which request owns which
page; every rank holds the same latents."""

import gc
import logging
import math
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from ...shared.config import ServeConfig
from ...shared.errors import ConfigError
from ...shared.model_spec import ModelSpec, num_kv_layers
from .host import available_memory

_HOST_SHARE = 0.5  # of free memory: other processes and the page cache need memory too
_HOST_LIMIT = 2 << 30  # bytes; a CPU decodes too slowly to fill more
_GPU_MARGIN = (
    512 << 20
)  # bytes for steps of other shapes, which may need more than the measured peak
# The driver's memory for one captured graph, beside its buffers: of the whole model, or of the part
# after sampling, which is the draft layer at most.
_GRAPH_BYTES, _AFTER_BYTES = 8 << 20, 2 << 20
_EXCHANGE_BYTES = 100 << 10  # the same for an exchange between ranks

logger = logging.getLogger(__name__)


def allocate_kv(num_pages: int, spec: ModelSpec, config: ServeConfig, dtype: torch.dtype) -> Tensor:
    """[num_pages, kv layers, page_size, latent_dim] of `dtype` on the worker's device. Zeros,
    because masked attention multiplies masked values by zero, and 0 * NaN is NaN. Host memory is
    taken only when a page is first written."""
    shape = (num_pages, num_kv_layers(spec, config), config.page_size, spec.latent_dim)
    if config.device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=config.device)
    size = math.prod(shape) * dtype.itemsize
    zeros = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(zeros, dtype=dtype).view(shape)


def count_pages(
    spec: ModelSpec,
    config: ServeConfig,
    dtype: torch.dtype,
    step_bytes: int = 0,
    graph_bytes: int = 0,
) -> int:
    """Pages for the scheduler, leaving room for one more: `max_total_token_num` if given, else as
    many as fit in free memory, never more than all rows at full length can use.

    Call when the weights are loaded and the libraries have run. `step_bytes`: memory of the largest
    step (`measure_peak`); `graph_bytes`: memory of CUDA graphs (`graph_allowance`). They come out
    of the share that `mem_fraction` leaves, and out of the rest if that is too little. Raises
    ConfigError if no page fits, or on a GPU fewer than `max_total_token_num` or else
    `max_req_total_len` needs.
    """
    asked = config.max_total_token_num
    if asked is not None and config.device == "cpu":
        return max(1, asked // config.page_size)
    page_bytes = num_kv_layers(spec, config) * config.page_size * spec.latent_dim * dtype.itemsize
    budget = _free_bytes(config, step_bytes + graph_bytes)
    pages = budget // page_bytes - 1  # the scratch page
    if pages < 1:
        raise ConfigError(
            f"{max(0, budget) >> 20} MiB are free for KV pages of {page_bytes} bytes each: no two "
            f"fit; free memory on {config.device} or raise --mem_fraction ({config.mem_fraction})"
        )
    needed = pages_per_row(spec, config)
    wanted, flag = needed, f"max_req_total_len {config.max_req_total_len}"
    if asked is not None:
        wanted, flag = max(1, asked // config.page_size), f"max_total_token_num {asked}"
    if config.device != "cpu" and pages < wanted:
        weights, steps = torch.cuda.memory_allocated(), step_bytes + graph_bytes
        fitting = (pages - 1) * config.page_size
        raise ConfigError(
            f"--{flag} needs {wanted * page_bytes / 1e9:.1f} GB of KV cache, {budget / 1e9:.1f} GB "
            f"are left beside the weights ({weights / 1e9:.1f} GB) and what steps and graphs need "
            f"({steps / 1e9:.1f} GB); lower it to {fitting} or less, lower --batch_max_tokens or "
            f"--graph_max_batch_size, or raise --tp or --mem_fraction ({config.mem_fraction})"
        )
    if asked is not None:
        return wanted
    return min(pages, (config.running_max_req_size or 1) * needed)


def pages_per_row(spec: ModelSpec, config: ServeConfig) -> int:
    """Most pages one row can have. One more than its longest request needs: a step that was
    planned before the end of the request was known may still write one token."""
    longest = config.max_req_total_len or spec.max_position_embeddings
    return -(-longest // config.page_size) + 1


def measure_peak(run: Callable[[], object]) -> int:
    """Bytes of device memory that `run` takes on top of what is allocated now, as the allocator
    takes it, in whole blocks, or in tensors if that is more: blocks that are partly in use may be
    there before. Run it once before: libraries allocate workspaces at first use. Leaves the
    allocator's cache empty."""
    _empty_cache()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    in_blocks = torch.cuda.max_memory_reserved() - reserved
    in_tensors = torch.cuda.max_memory_allocated() - allocated
    _empty_cache()
    return max(0, in_blocks, in_tensors)


def graph_allowance(
    step_bytes: int, num_steps: int, has_drafts: bool = False, num_exchanges: int = 0
) -> int:
    """Bytes that CUDA graphs of `num_steps` steps with one common pool will take, if the largest
    step needs `step_bytes` when it runs by itself and each has so many exchanges between ranks.
    With drafts a step has two graphs."""
    each = _GRAPH_BYTES + (_AFTER_BYTES if has_drafts else 0) + num_exchanges * _EXCHANGE_BYTES
    return step_bytes + num_steps * each


def _empty_cache() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _free_bytes(config: ServeConfig, needed: int) -> int:
    """Bytes for KV, `needed` ones for steps put aside."""
    if config.device == "cpu":
        share = available_memory() * _HOST_SHARE * config.mem_fraction / config.tp
        return min(int(share), _HOST_LIMIT)
    free, total = torch.cuda.mem_get_info()
    kept = max(int((1 - config.mem_fraction) * total), needed + _GPU_MARGIN)
    logger.info(
        "%.2f of %.2f GB are free, %.2f GB of them kept for steps, which need %.2f GB",
        *(n / 1e9 for n in (free, total, kept, needed)),
    )
    return free - kept
