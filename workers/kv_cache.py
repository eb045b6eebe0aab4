"""The KV pages of one rank: one tensor, sized once. Which page belongs to whom is the scheduler's
business; every rank holds the same latents."""

import math
import mmap

import torch
from torch import Tensor

from ..shared.config import ServeConfig
from ..shared.errors import ConfigError
from ..shared.model_spec import ModelSpec
from .host import available_memory

_HOST_SHARE = 0.5  # of free memory: the other processes and the page cache live there too
_HOST_LIMIT = 2 << 30  # bytes; a CPU decodes too slowly to fill more


def allocate_kv(num_pages: int, spec: ModelSpec, config: ServeConfig, dtype: torch.dtype) -> Tensor:
    """[num_pages, num_layers, page_size, latent_dim] of `dtype` on the worker's device. Zeros,
    because masked attention multiplies what it does not see by zero, and 0 * NaN is NaN. Host
    memory is taken only when a page is first written."""
    shape = (num_pages, spec.num_layers, config.page_size, spec.latent_dim)
    if config.device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=config.device)
    size = math.prod(shape) * dtype.itemsize
    zeros = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(zeros, dtype=dtype).view(shape)


def count_pages(spec: ModelSpec, config: ServeConfig, dtype: torch.dtype) -> int:
    """Pages to allocate: `max_total_token_num` if given, else what free memory holds, never more
    than all rows at full length can use. Call after the weights are loaded. Raises ConfigError
    if not even one page fits."""
    if config.max_total_token_num is not None:
        return max(1, config.max_total_token_num // config.page_size)
    page_bytes = spec.num_layers * config.page_size * spec.latent_dim * dtype.itemsize
    budget = _free_bytes(config)
    if budget < page_bytes:
        raise ConfigError(
            f"{budget >> 20} MiB are free for KV pages of {page_bytes} bytes each: not one fits; "
            f"free memory on {config.device} or raise --mem_fraction ({config.mem_fraction})"
        )
    rows = config.running_max_req_size or 1
    useful = rows * pages_per_row(spec, config)
    return min(budget // page_bytes, useful)


def pages_per_row(spec: ModelSpec, config: ServeConfig) -> int:
    """Most pages one row can have. One more than its longest request needs: a step that was
    planned before the end of the request was known may still write one token."""
    longest = config.max_req_total_len or spec.max_position_embeddings
    return -(-longest // config.page_size) + 1


def _free_bytes(config: ServeConfig) -> int:
    if config.device == "cpu":
        share = available_memory() * _HOST_SHARE * config.mem_fraction / config.tp
        return min(int(share), _HOST_LIMIT)
    free, total = torch.cuda.mem_get_info()
    return int(free - (1 - config.mem_fraction) * total)
