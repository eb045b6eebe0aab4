"""Decode steps as CUDA graphs give what single launches give, whatever the batch."""

from pathlib import Path
from typing import Any

import pytest
from engine import Engine
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.graphs import batch_sizes, covering_size

PROMPTS = [[(5 * i + n) % 150 for i in range(n)] for n in (1, 3, 17, 40, 64, 65, 100)]


@pytest.mark.parametrize(
    ("count", "size"),
    [(0, None), (1, 2), (2, 2), (3, 5), (5, 5), (6, 9), (9, 9), (10, None)],
)
def test_a_batch_takes_the_least_size_that_holds_it(count: int, size: int | None) -> None:
    assert covering_size([2, 5, 9], count) == size


@pytest.mark.parametrize("num_drafts", [1, 4, 7])
def test_sizes_with_drafts_are_bounded_by_tokens(num_drafts: int) -> None:
    sizes = batch_sizes(512, num_drafts)
    assert sizes == sorted(set(sizes))
    assert 900 < sizes[-1] * (num_drafts + 1) <= 1024


@pytest.mark.parametrize("largest", [1, 2, 7, 8, 48, 100, 256, 512, 1000])
def test_sizes_cover_every_batch_with_little_waste(largest: int) -> None:
    sizes = batch_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    for rows in range(1, largest + 1):
        size = covering_size(sizes, rows)
        assert size is not None
        assert size >= rows, "a smaller graph leaves rows out"
        assert size - rows <= max(3, rows // 2, 1)
        assert rows < 64 or size - rows < 32


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [
    SamplingParams(max_new_tokens=20),
    SamplingParams(max_new_tokens=20, temperature=1.0, seed=5, presence_penalty=0.5),
    SamplingParams(max_new_tokens=20, temperature=0.7, seed=9, top_p=0.9, top_k=20),
])  # fmt: skip
def test_graphs_change_no_token(
    tiny_model: Path, make_runner: Any, driver_of: Any, sampling: SamplingParams
) -> None:
    outputs = []
    for options in ({"disable_cudagraph": True}, {"graph_max_batch_size": 8}):
        runner = make_runner(tiny_model, device="cuda", data_type="bfloat16", **options)
        driver = driver_of(runner.run, 64)
        with runner.forward.without_graphs(decode=False):  # prompts run alike
            outputs.append([s.outputs for s in driver.generate(PROMPTS, sampling, 16)])
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
def test_a_graph_fits_any_rows(
    tiny_model: Path, make_runner: Any, driver_of: Any, gap_where_parted: Any
) -> None:
    """Batches that shrink, grow and are padded; kernels differ with their size, so
    tokens may part where the two best were as close as rounding."""
    greedy = SamplingParams(max_new_tokens=12, num_logprobs=2)
    runner = make_runner(tiny_model, device="cuda", data_type="bfloat16", graph_max_batch_size=8)
    alone = [driver_of(runner.run, 64).generate([p], greedy, None)[0] for p in PROMPTS]
    together = driver_of(runner.run, 64).generate(PROMPTS, greedy, None)
    for a, b in zip(alone, together, strict=True):
        gap = gap_where_parted(a, b)
        assert gap is None or gap < 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eagle_with_att", "vanilla_with_att"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_change_no_token_with_drafts(
    tiny_model: Path, tmp_path: Path, mode: str, temperature: float
) -> None:
    sampling = SamplingParams(max_new_tokens=24, temperature=temperature, seed=3)
    drafts = {"mtp_mode": mode, "mtp_step": 3, "mtp_fixed_step": True}
    outputs = []
    for options in ({"disable_cudagraph": True}, {"graph_max_batch_size": 8}):
        changes = {"device": "cuda", "data_type": "bfloat16", **drafts, **options}
        engine = Engine(tiny_model, tmp_path, **changes)
        with engine.runner.forward.without_graphs(decode=False):  # prompts run alike
            outputs.append(engine.generate(PROMPTS, sampling))
    assert outputs[0] == outputs[1]
