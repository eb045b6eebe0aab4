"""Tensor parallelism changes no token; a size that does not fit is refused."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.errors import ConfigError
from glimmer.shared.messages import (
    PrefillChunk,
    Ready,
    RowAdmit,
    Shutdown,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.parallel import Ranks, check_split, join_ranks
from models import make_guessable

PROMPTS = [[(7 * i + n) % 150 for i in range(n)] for n in (1, 30, 75)]
GREEDY = SamplingParams(max_new_tokens=10, num_logprobs=2, num_prompt_logprobs=1)
RANDOM = SamplingParams(max_new_tokens=10, temperature=1.0, seed=3, presence_penalty=0.5)
OUTPUTS = 24
CLOSE = 0.3  # logarithmic: how far ahead a token may be that the other side does not choose
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


@dataclasses.dataclass
class Reply:
    """The outputs of one prompt."""

    outputs: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)


def generate(
    run: Callable[[StepPlan], StepResult], prompts: Sequence[list[int]], drafts: int
) -> tuple[list[Reply], int]:
    """`OUTPUTS` greedy tokens of each prompt, all rows with `drafts` drafts in each step, and the
    steps it took."""
    params = SamplingParams(max_new_tokens=OUTPUTS, num_logprobs=2)
    rows, pages = list(range(len(prompts))), 16
    admits = [RowAdmit(r, params, [r * pages + n for n in range(pages)], 0, 0, []) for r in rows]
    chunks = [PrefillChunk(r, 0, prompts[r], sample=True) for r in rows]
    plan = StepPlan(0, 0, [], admits, [], chunks, [], drafts)
    replies = [Reply() for _ in rows]
    steps = 0
    while min(len(reply.outputs) for reply in replies) < OUTPUTS:
        for reply, found in zip(replies, run(plan).rows, strict=True):
            reply.outputs += found.token_ids[: OUTPUTS - len(reply.outputs)]
            reply.logprobs += found.logprobs[: OUTPUTS - len(reply.logprobs)]
        plan = StepPlan(0, 0, [], [], [], [], rows, drafts)
        steps += 1
    run(StepPlan(0, 0, rows, [], [], [], []))
    return replies, steps


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.gpu, TWO_CARDS]),
])  # fmt: skip
def test_ranks_in_bfloat16_part_from_one_only_where_it_is_close(
    tmp_path: Path,
    make_runner: Any,
    start_group: Any,
    gap_where_parted: Any,
    drafts: int,
    device: str,
) -> None:
    """Sums of two halves are rounded elsewhere. On cards with CUDA graphs, as it is served."""
    make_guessable(tmp_path)
    mtp = {"mtp_mode": "eagle_with_att", "mtp_step": drafts} if drafts else {}
    values = {"device": device, "data_type": "bfloat16", "page_size": 16, **mtp}
    alone, _ = generate(make_runner(tmp_path, **values).run, PROMPTS, drafts)
    group = start_group(tmp_path, tp=2, **values)
    # The launcher hears of progress, but nothing while kernels are compiled.
    group.wait_for(Ready, 2, at="launcher", patience_s=300)
    together, steps = generate(group.run, PROMPTS, drafts)
    gaps = [gap_where_parted(a, b) for a, b in zip(alone, together, strict=True)]
    print(f"{device}, {drafts} drafts: {steps} steps, tokens part by {gaps}")
    assert all(gap is None or gap < CLOSE for gap in gaps)
    for a, b in zip(alone, together, strict=True):
        assert a.logprobs[0].logprob == pytest.approx(b.logprobs[0].logprob, abs=CLOSE)
    assert steps < OUTPUTS if drafts else steps == OUTPUTS
    group.send(Shutdown(0))
    assert group.exit_codes() == [0, 0]


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
