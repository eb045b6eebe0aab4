"""How many pages there are, and what they look like."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from glimmer.shared.errors import ConfigError
from glimmer.shared.model_spec import load_model_spec
from glimmer.workers.kv_cache import allocate_kv, count_pages, pages_per_row

FREE = "glimmer.workers.kv_cache.available_memory"


def pages(path: Path, config: Any) -> int:
    return count_pages(load_model_spec(path), config, torch.float32)


def test_an_asked_capacity_is_kept(tiny_model: Path, config_of: Any) -> None:
    assert pages(tiny_model, config_of(tiny_model, max_total_token_num=1000)) == 15
    assert pages(tiny_model, config_of(tiny_model, max_total_token_num=3)) == 1


def test_host_memory_is_taken_when_pages_are_written(tiny_model: Path, config_of: Any) -> None:
    config = config_of(tiny_model)
    before = psutil.Process().memory_info().rss
    kv = allocate_kv(10_000, load_model_spec(tiny_model), config, torch.float32)
    assert kv.nbytes > 500 << 20
    assert psutil.Process().memory_info().rss - before < 100 << 20
    assert not kv[::999].any()
    kv[7] = 1
    assert kv.sum() == kv[7].numel()


def test_free_memory_decides_otherwise(
    tiny_model: Path, config_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_bytes = 4 * 64 * 80 * 4  # layers, tokens, latent width, float32
    monkeypatch.setattr(FREE, lambda: 40 * page_bytes)
    config = config_of(tiny_model, max_total_token_num=None, mem_fraction=0.5)
    assert pages(tiny_model, config) == 10
    config = config_of(tiny_model, max_total_token_num=None, mem_fraction=0.5, tp=2)
    assert pages(tiny_model, config) == 5


def test_never_more_than_all_rows_can_use(
    tiny_model: Path, config_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FREE, lambda: 1 << 50)
    config = config_of(
        tiny_model, max_total_token_num=None, running_max_req_size=3, max_req_total_len=129
    )
    assert pages_per_row(load_model_spec(tiny_model), config) == 4
    assert pages(tiny_model, config) == 12


def test_no_room_for_one_page_says_what_to_change(
    tiny_model: Path, config_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FREE, lambda: 1000)
    with pytest.raises(ConfigError, match="mem_fraction"):
        pages(tiny_model, config_of(tiny_model, max_total_token_num=None))


def test_pages_start_as_zeros(tiny_model: Path, config_of: Any) -> None:
    spec = load_model_spec(tiny_model)
    kv = allocate_kv(3, spec, config_of(tiny_model), torch.bfloat16)
    assert (kv.shape, kv.dtype) == ((3, 4, 64, 80), torch.bfloat16)
    assert kv.abs().sum() == 0
