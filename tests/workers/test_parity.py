"""The promise of exactness: the worker's float32 path gives the tokens and log-probabilities of
transformers, however prompts are chunked, batched, cached or interleaved with decoding."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from glimmer.shared.messages import Ready
from glimmer.shared.sampling import SamplingParams

VOCAB = 160
LENGTHS = (1, 2, 5, 16, 17, 63, 64, 65, 130, 300)
VARIANTS = ("plain", "grouped", "all_sparse")
# Both sides sum the same products in different orders; measured 4e-6.
TOLERANCE = 5e-5
GREEDY = SamplingParams(max_new_tokens=8, num_logprobs=VOCAB)


def random_prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]


def check(reference: Any, sequence: Any, tolerance: float = TOLERANCE) -> float:
    """Outputs are transformers' greedy tokens; -> largest difference of a log-probability."""
    table = reference.logprobs(sequence.prompt + sequence.outputs)[len(sequence.prompt) - 1 : -1]
    assert sequence.outputs == table.argmax(-1).tolist()
    largest = 0.0
    for expected, found in zip(table, sequence.logprobs, strict=False):
        got = torch.empty(VOCAB)
        ids, values = zip(*found.top, strict=True)
        got[list(ids)] = torch.tensor(values)
        largest = max(largest, (got - expected).abs().max().item())
        assert found.logprob == pytest.approx(expected.max().item(), abs=tolerance)
        assert found.rank == 1
    assert largest <= tolerance
    return largest


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
def test_batched_prompts_of_all_lengths_match(
    make_reference: Any, make_runner: Any, driver_of: Any, variant: str, chunk_size: int | None
) -> None:
    reference = make_reference(variant)
    runner = make_runner(reference.path, page_size=reference.page_size)
    driver = driver_of(runner.run, reference.page_size)
    found = driver.generate(random_prompts(LENGTHS), GREEDY, chunk_size)
    largest = max(check(reference, sequence) for sequence in found)
    print(f"{variant} chunk {chunk_size}: largest logprob difference {largest:.1e}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_alone_equals_batched(
    make_reference: Any, make_runner: Any, driver_of: Any, variant: str
) -> None:
    reference = make_reference(variant)
    driver = driver_of(
        make_runner(reference.path, page_size=reference.page_size).run, reference.page_size
    )
    prompts = random_prompts((1, 17, 130), seed=1)
    batched = [s.outputs for s in driver.generate(prompts, GREEDY, 64)]
    for chunk_size in (7, None):
        alone = [driver.generate([prompt], GREEDY, chunk_size)[0] for prompt in prompts]
        assert [s.outputs for s in alone] == batched
        for sequence in alone:
            check(reference, sequence)


@pytest.mark.parametrize("variant", VARIANTS)
def test_start_from_a_cached_prefix_while_others_decode(
    make_reference: Any, make_runner: Any, driver_of: Any, variant: str
) -> None:
    reference = make_reference(variant)
    size = reference.page_size
    driver = driver_of(make_runner(reference.path, page_size=size).run, size)
    base = random_prompts((200,), seed=2)[0]
    first = driver.add(base, GREEDY)
    for _ in range(3):
        driver.step(chunk_size=90)  # `first` is still decoding when the others arrive
    shared = driver.add(base[:150] + random_prompts((20,), seed=3)[0], GREEDY, cached=first)
    again = driver.add(base, GREEDY, cached=first)
    fresh = driver.add(random_prompts((33,), seed=4)[0], GREEDY)
    assert shared.num_cached == 150 // size * size
    assert again.num_cached == 199 // size * size
    driver.finish(chunk_size=13)
    for sequence in (first, shared, again, fresh):
        check(reference, sequence)
    assert again.outputs == first.outputs


def test_long_chunk_over_cached_prefix_uses_segments(
    make_reference: Any, make_runner: Any, driver_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks above the absorbed limit read their prefix up-projected; here in several segments
    and score blocks, as a long context would."""
    monkeypatch.setattr("glimmer.kernels.attention.mla_prefill._SEGMENT", 128)
    monkeypatch.setattr("glimmer.kernels.attention.mla_prefill.MAX_SCORES", 1 << 16)
    monkeypatch.setattr("glimmer.kernels.attention.mla_decode.MAX_SCORES", 1 << 16)
    reference = make_reference("plain")
    driver = driver_of(make_runner(reference.path, page_size=16).run, 16)
    prompts = random_prompts((1300, 530), seed=5)
    for chunk_size in (600, 512, None):
        for sequence in driver.generate(prompts, GREEDY, chunk_size):
            check(reference, sequence)


@pytest.mark.parametrize("chunk_size", [1, 7, None])
def test_prompt_logprobs_match(
    make_reference: Any, make_runner: Any, driver_of: Any, chunk_size: int | None
) -> None:
    reference = make_reference("plain")
    driver = driver_of(make_runner(reference.path, page_size=16).run, 16)
    sampling = SamplingParams(max_new_tokens=2, num_prompt_logprobs=3)
    for sequence in driver.generate(random_prompts((1, 40, 300), seed=6), sampling, chunk_size):
        table = reference.logprobs(sequence.prompt)[:-1]
        entries = sequence.prompt_logprobs
        assert [e.token_id for e in entries] == sequence.prompt[1:]
        for expected, entry in zip(table, entries, strict=True):
            own = expected[entry.token_id].item()
            assert entry.logprob == pytest.approx(own, abs=TOLERANCE)
            assert abs(entry.rank - 1 - int((expected > own).sum())) <= 1
            best = expected.topk(3).values.tolist()
            assert [v for _, v in entry.top] == pytest.approx(best, abs=TOLERANCE)


def test_resumed_request_continues_with_the_same_tokens(
    make_reference: Any, make_runner: Any, driver_of: Any
) -> None:
    """Preemption: prompt and outputs so far come back as known tokens, in any chunks."""
    reference = make_reference("plain")
    driver = driver_of(make_runner(reference.path, page_size=16).run, 16)
    sampling = SamplingParams(max_new_tokens=24, temperature=0.9, seed=5, frequency_penalty=0.5)
    prompt = random_prompts((50,), seed=7)[0]
    whole = driver.generate([prompt], sampling)[0].outputs
    for chunk_size in (9, None):
        driver.clear()
        resumed = driver.add(prompt, sampling, outputs=whole[:10])
        driver.finish(chunk_size)
        assert resumed.outputs == whole


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_as_exact_as_transformers(
    make_reference: Any, make_runner: Any, driver_of: Any, variant: str
) -> None:
    """Error against the float32 result of the same weights, ours over transformers' own.

    Both sides round in different places, so now and then a token takes another expert than in
    float32; in the first layer that shifts all later positions of its sequence. Either side may
    be the unlucky one (over single prompt sets the median ratio went from 0.79 to 1.32), so 12 sets
    are pooled. Measured: medians 0.95 to 0.98, means 0.91 to 1.02, positions off by more than 0.1
    39 to 64 of ours, 34 to 73 of theirs, out of 3192."""
    reference = make_reference(variant, torch.bfloat16)
    wide = reference.widened()
    driver = driver_of(make_runner(reference.path, page_size=16).run, 16)
    sampling = SamplingParams(max_new_tokens=1, num_prompt_logprobs=VOCAB)
    ours, theirs = [], []
    for seed in range(12):
        for sequence in driver.generate(random_prompts((5, 64, 200), seed), sampling, 64):
            truth = wide.logprobs(sequence.prompt)[:-1]
            other = reference.logprobs(sequence.prompt)[:-1]
            tops = [[value for _, value in sorted(e.top)] for e in sequence.prompt_logprobs]
            ours.append((torch.tensor(tops) - truth).abs().mean(-1))
            theirs.append((other - truth).abs().mean(-1))
    mine, its = torch.cat(ours), torch.cat(theirs)
    median = (mine.median() / its.median()).item()
    mean = (mine.mean() / its.mean()).item()
    off = [int((error > 0.1).sum()) for error in (mine, its)]
    print(f"bf16 {variant}: error ratio median {median:.2f}, mean {mean:.2f}, off {off}")
    assert median < 1.1
    assert mean < 1.3
    assert off[0] < 1.5 * off[1]


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_print_the_full_table(
    make_reference: Any, driver_of: Any, start_group: Any, tp: int
) -> None:
    """20 prompts, all chunk sizes, real processes; `-s -m slow` prints one line per run."""
    reference = make_reference("plain")
    group = start_group(reference.path, tp=tp, page_size=16)
    group.wait_for(Ready, tp)
    driver = driver_of(group.run, 16)
    lengths = (*LENGTHS, *range(3, 300, 31))
    prompts = random_prompts(lengths, seed=9)
    for chunk_size in (1, 7, 64, None):
        found = driver.generate(prompts, GREEDY, chunk_size)
        largest = max(check(reference, sequence) for sequence in found)
        line = f"tp {tp} chunk {chunk_size}: {len(found)} prompts equal, largest {largest:.1e}"
        print(line)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_code_runs_on_cuda(
    make_reference: Callable[..., Any], make_runner: Any, driver_of: Any, variant: str
) -> None:
    reference = make_reference(variant)
    runner = make_runner(reference.path, page_size=reference.page_size, device="cuda")
    driver = driver_of(runner.run, reference.page_size)
    for chunk_size in (7, None):
        for sequence in driver.generate(random_prompts((1, 17, 130, 300)), GREEDY, chunk_size):
            check(reference, sequence, tolerance=1e-3)
