"""Tensor parallelism changes no token; a size that does not fit is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.errors import ConfigError
from glimmer.shared.messages import Ready, Shutdown
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.parallel import Ranks, check_split, join_ranks

PROMPTS = [[(7 * i + n) % 150 for i in range(n)] for n in (1, 30, 75)]
GREEDY = SamplingParams(max_new_tokens=10, num_logprobs=2, num_prompt_logprobs=1)
RANDOM = SamplingParams(max_new_tokens=10, temperature=1.0, seed=3, presence_penalty=0.5)


TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize(
    ("tp", "device"),
    [
        (2, "cpu"),
        pytest.param(4, "cpu", marks=pytest.mark.slow),
        pytest.param(2, "cuda", marks=[pytest.mark.gpu, TWO_CARDS]),
    ],
)
def test_ranks_in_processes_give_the_tokens_of_one(
    make_reference: Any, make_runner: Any, driver_of: Any, start_group: Any, tp: int, device: str
) -> None:
    path = make_reference("plain").path
    group = start_group(path, tp=tp, page_size=16, device=device)
    single = driver_of(make_runner(path, page_size=16, device=device).run, 16)
    ready = group.wait_for(Ready, tp)
    assert sorted(message.index for message in ready) == list(range(tp))
    driver = driver_of(group.run, 16)
    for sampling in (GREEDY, RANDOM):
        for chunk_size in (16, None):
            expected = single.generate(PROMPTS, sampling, chunk_size)
            found = driver.generate(PROMPTS, sampling, chunk_size)
            for a, b in zip(expected, found, strict=True):
                assert a.outputs == b.outputs
                for x, y in zip(
                    a.logprobs + a.prompt_logprobs, b.logprobs + b.prompt_logprobs, strict=True
                ):
                    assert (x.token_id, x.rank) == (y.token_id, y.rank)
                    assert x.logprob == pytest.approx(y.logprob, abs=5e-5)
    group.send(Shutdown(0))
    assert group.exit_codes() == [0] * tp


def test_shares_cover_everything_once() -> None:
    for size in (1, 7, 8, 154880):
        for tp in (1, 2, 3, 4):
            slices = [Ranks(rank, tp).split(size) for rank in range(tp)]
            assert [i for s in slices for i in range(size)[s]] == list(range(size))


def test_alone_nothing_is_exchanged() -> None:
    x = torch.randn(2, 3)
    ranks = join_ranks(0, 1, 0, Path("/nonexistent"), 1.0)
    assert ranks.all_reduce(x) is x
    assert ranks.broadcast(x) is x
    assert ranks.gather_columns(x) is x


def test_a_missing_rank_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        join_ranks(0, 2, 0, tmp_path, 0.2)


@pytest.mark.parametrize(
    ("tp", "named"),
    [(3, "num_attention_heads 4"), (8, "num_attention_heads 4"), (0, "num_attention_heads 4")],
)
def test_a_size_that_does_not_divide_is_named(tiny_model: Path, tp: int, named: str) -> None:
    with pytest.raises(ConfigError, match=f"--tp {tp} must divide {named}"):
        check_split(load_model_spec(tiny_model), tp)


def test_every_split_dimension_is_checked(tiny_model: Path) -> None:
    spec = load_model_spec(tiny_model)
    check_split(spec, 4)
    with pytest.raises(ConfigError, match="--tp 4 must divide intermediate_size 250"):
        check_split(dataclasses.replace(spec, intermediate_size=250), 4)
    with pytest.raises(ConfigError, match="--tp 4 must divide moe_intermediate_size 62"):
        check_split(dataclasses.replace(spec, moe_intermediate_size=62), 4)
    no_dense = dataclasses.replace(spec, intermediate_size=250, first_dense_layers=0)
    check_split(no_dense, 4)
