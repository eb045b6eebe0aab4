"""How many pages there are, and what they look like."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ConfigError
from glimmer.shared.model_spec import ModelSpec, load_model_spec
from glimmer.workers.memory.kv_cache import (
    allocate_kv,
    count_pages,
    graph_allowance,
    measure_peak,
    pages_per_row,
)

FREE = "glimmer.workers.memory.kv_cache.available_memory"


def pages(path: Path, config: Any) -> int:
    return count_pages(load_model_spec(path), config, torch.float32)


def test_an_asked_capacity_is_kept(tiny_model: Path, config_of: Any) -> None:
    assert pages(tiny_model, config_of(tiny_model, max_total_token_num=1000)) == 15
    assert pages(tiny_model, config_of(tiny_model, max_total_token_num=3)) == 1


def test_host_memory_is_taken_when_pages_are_written(tiny_model: Path, config_of: Any) -> None:
    psutil = pytest.importorskip("psutil")
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
    assert pages(tiny_model, config) == 9  # and one more for scratch
    config = config_of(tiny_model, max_total_token_num=None, mem_fraction=0.5, tp=2)
    assert pages(tiny_model, config) == 4


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


def test_drafts_have_layers_of_their_own(tiny_model: Path, config_of: Any) -> None:
    spec = load_model_spec(tiny_model)
    for mode, layers in ((None, 4), ("eagle_with_att", 5), ("vanilla_with_att", 7)):
        config = config_of(tiny_model, mtp_mode=mode, mtp_step=3 if mode else 0)
        assert allocate_kv(1, spec, config, torch.bfloat16).shape == (1, layers, 64, 80)


GB = 10**9
TOTAL = int(79.1 * (1 << 30))  # what CUDA reports of an H100 80GB


def flash(path: Path, **changes: Any) -> ModelSpec:
    """The dimensions of GLM-4.7-Flash that count here."""
    dims = {"num_layers": 47, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    return dataclasses.replace(load_model_spec(path), **{**dims, **changes})


@pytest.fixture
def guide(tiny_model: Path, config_of: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The guide's first script on an H100 with the weights loaded."""
    context = 600 << 20
    free = TOTAL - context - int(59.9 * GB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: int(59.9 * GB))
    return config_of(
        tiny_model,
        device="cuda",
        max_total_token_num=None,
        max_req_total_len=202752,
        running_max_req_size=512,
        mem_fraction=ServeConfig().mem_fraction,
    )


def test_the_guides_script_gets_380000_tokens_on_80_gb(tiny_model: Path, guide: Any) -> None:
    spec = flash(tiny_model)
    step, graphs = int(1.6 * GB), graph_allowance(GB, 40)
    pages = count_pages(spec, guide, torch.bfloat16, step, graphs)
    assert 380_000 <= pages * 64 < 409_000
    free, _ = torch.cuda.mem_get_info()
    assert (pages + 1) * 64 * 54_144 + step + graphs < free
    drafting = dataclasses.replace(guide, mtp_mode="eagle_with_att", mtp_step=4)
    assert count_pages(spec, drafting, torch.bfloat16, step, graphs) < pages


def test_graphs_of_drafts_take_little() -> None:
    """The guide's server with four drafts: 87 kinds of steps, each cut in two by sampling."""
    alone, drafting = graph_allowance(GB, 32), graph_allowance(GB, 87, has_drafts=True)
    assert alone == GB + (256 << 20)
    assert drafting == GB + (870 << 20)


def test_exchanges_between_ranks_are_in_the_graphs() -> None:
    assert graph_allowance(GB, 32, num_exchanges=95) == graph_allowance(GB, 32) + 32 * 95 * 102_400


def test_mem_fraction_keeps_a_share_of_the_whole_card(tiny_model: Path, guide: Any) -> None:
    config = dataclasses.replace(guide, mem_fraction=0.9)
    free, total = torch.cuda.mem_get_info()
    wanted = (free - total / 10) / 54_144
    for needed in (0, 4 * GB):  # a step has room in what is kept anyway
        tokens = 64 * count_pages(flash(tiny_model), config, torch.bfloat16, needed)
        assert tokens == pytest.approx(wanted, abs=130)


def test_a_request_that_cannot_fit_is_told_at_start(tiny_model: Path, guide: Any) -> None:
    spec = flash(tiny_model)
    with pytest.raises(ConfigError) as caught:
        count_pages(spec, guide, torch.bfloat16, 15 * GB)
    said = str(caught.value)
    assert "--max_req_total_len 202752 needs 11.0 GB of KV cache" in said
    fitting = int(said.partition("lower it to ")[2].split()[0])
    smaller = dataclasses.replace(guide, max_req_total_len=fitting)
    assert count_pages(spec, smaller, torch.bfloat16, 15 * GB) * 64 >= fitting
    larger = dataclasses.replace(guide, max_req_total_len=fitting + 64)
    with pytest.raises(ConfigError):
        count_pages(spec, larger, torch.bfloat16, 15 * GB)


def test_an_asked_capacity_must_fit_on_a_gpu(tiny_model: Path, guide: Any) -> None:
    spec = flash(tiny_model)
    some = dataclasses.replace(guide, max_total_token_num=100_000)
    assert count_pages(spec, some, torch.bfloat16) == 100_000 // 64
    many = dataclasses.replace(guide, max_total_token_num=900_000)
    with pytest.raises(ConfigError, match=r"--max_total_token_num 900000 needs 48\.7 GB"):
        count_pages(spec, many, torch.bfloat16)


@pytest.mark.gpu
def test_the_peak_is_what_a_step_takes_for_a_while() -> None:
    measure_peak(lambda: None)  # or `kept` lies in a large block that is left from other tests
    kept = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_allocated()

    def step() -> None:
        parts = [torch.empty(64 << 20, dtype=torch.uint8, device="cuda") for _ in range(3)]
        del parts

    assert 192 << 20 <= measure_peak(step) <= 256 << 20
    assert measure_peak(lambda: None) == 0
    assert torch.cuda.memory_allocated() == before
    del kept


@pytest.mark.gpu
def test_memory_that_is_free_only_for_now_is_in_the_peak() -> None:
    """A block that something else is in stays with the allocator, and a step would fit there. What
    is captured in a graph would not."""
    measure_peak(lambda: None)
    block = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    del block
    kept = torch.empty(16 << 20, dtype=torch.uint8, device="cuda")
    step = 128 << 20
    peak = measure_peak(lambda: torch.empty(step, dtype=torch.uint8, device="cuda"))
    assert step <= peak <= 2 * step
    del kept
