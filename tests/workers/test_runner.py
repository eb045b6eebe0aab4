"""Steps as the scheduler sees them: what a plan may hold, what comes back, what is refused."""

import contextlib
import math
import random
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from engine import Engine
from glimmer.shared.messages import Finished, PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.model.glm4_moe_lite import compute_logits

GREEDY = SamplingParams(max_new_tokens=6)


def admit(row: int, pages: list[int], cached: int = 0, **values: Any) -> RowAdmit:
    params = SamplingParams(**{"max_new_tokens": 6, **values})
    return RowAdmit(row, params, pages, cached, 0, [])


def plan(admitted: Any = (), prefill: Any = (), decode: Any = (), freed: Any = ()) -> StepPlan:
    return StepPlan(0, 5, list(freed), list(admitted), [], list(prefill), list(decode))


def test_results_follow_the_plans_order(tiny_model: Path, make_runner: Any) -> None:
    runner = make_runner(tiny_model)
    first = PrefillChunk(0, 0, [1, 2, 3], sample=True)
    one = runner.run(plan([admit(0, [0])], [first])).rows[0].token_ids
    again = runner.run(
        plan(
            [admit(1, [1]), admit(2, [2], num_prompt_logprobs=0), admit(3, [3])],
            [
                PrefillChunk(1, 0, [9, 9], sample=False, next_id=9),
                PrefillChunk(2, 0, [4, 5, 6], sample=True),
                PrefillChunk(3, 0, [1, 2, 3], sample=True),
            ],
            [0],
        )
    )
    assert (again.epoch, again.step) == (0, 5)
    assert len(again.rows) == 3
    assert again.rows[1].token_ids == one
    assert [len(entries) for entries in again.prompt_logprobs] == [0, 2, 0]


def test_a_plan_that_runs_nothing_is_answered(tiny_model: Path, make_runner: Any) -> None:
    runner = make_runner(tiny_model)
    assert runner.run(plan([admit(0, [1])])).rows == []
    assert runner.run(plan(freed=[0])).rows == []


def test_a_reused_row_forgets_its_past(tiny_model: Path, make_runner: Any) -> None:
    runner = make_runner(tiny_model)
    chunk = PrefillChunk(0, 0, [3, 1, 4], sample=True)
    penalised: dict[str, Any] = {"repetition_penalty": 3.0, "presence_penalty": 9.0}
    fresh = runner.run(plan([admit(0, [0], **penalised)], [chunk]))
    for _ in range(4):
        runner.run(plan(decode=[0]))
    again = runner.run(plan([admit(0, [7], **penalised)], [chunk], freed=[0]))
    assert again.rows == fresh.rows


def test_pages_of_finished_rows_can_be_read_by_others(tiny_model: Path, make_runner: Any) -> None:
    runner = make_runner(tiny_model, page_size=4)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    whole = runner.run(plan([admit(0, [0, 1, 2])], [PrefillChunk(0, 0, ids, sample=True)]))
    tail = PrefillChunk(1, 8, ids[8:], sample=True)
    shared = runner.run(plan([admit(1, [0, 1, 9], cached=8)], [tail], freed=[0]))
    assert shared.rows == whole.rows


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (plan([admit(0, [-1])]), "pages"),
        (plan([admit(0, [256])]), "pages"),
        (plan([admit(0, [0])], [PrefillChunk(0, 1, [1], sample=True)]), "starts at 1"),
        (plan([admit(0, [0])], [PrefillChunk(0, 0, [1] * 65, sample=True)]), "65 new tokens"),
        (plan(decode=[3]), "row 3"),
    ],
)
def test_wrong_plans_are_refused(
    tiny_model: Path, make_runner: Any, bad: StepPlan, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make_runner(tiny_model).run(bad)


def test_a_poisoned_row_is_named_instead_of_sampled(
    tiny_model: Path, make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(*args: Any) -> Any:
        logits = compute_logits(*args)
        assert logits is not None
        logits[1] = math.nan
        return logits

    runner = make_runner(tiny_model)
    monkeypatch.setattr("glimmer.workers.forward.compute_logits", poisoned)
    chunks = [PrefillChunk(row, 0, [1], sample=True) for row in (4, 6)]
    with pytest.raises(FloatingPointError, match="row 6"):
        runner.run(plan([admit(4, [0]), admit(6, [1])], chunks))


def test_prompt_logprobs_behind_a_cached_prefix_stay_aligned(
    tiny_model: Path, make_runner: Any
) -> None:
    runner = make_runner(tiny_model, page_size=4)
    chunk = PrefillChunk(0, 4, [7, 8], sample=True)
    found = runner.run(plan([admit(0, [0, 1], cached=4, num_prompt_logprobs=0)], [chunk]))
    entries = found.prompt_logprobs[0]
    assert [entry.token_id for entry in entries] == [7, 8]
    assert entries[0].rank == 0
    assert entries[1].rank > 0


def test_steps_may_be_launched_ahead_of_results(tiny_model: Path, make_runner: Any) -> None:
    plans = [plan([admit(0, [0])], [PrefillChunk(0, 0, [3, 1, 4], sample=True)])]
    plans += [plan(decode=[0])] * 3  # equal plans: a step is known by itself, not by its plan
    one_by_one = make_runner(tiny_model)
    expected = [one_by_one.run(p).rows for p in plans]
    runner = make_runner(tiny_model)
    steps = [runner.launch(p) for p in plans]
    assert [runner.finish(step).rows for step in steps] == expected


@pytest.mark.parametrize(
    ("place", "is_known"),
    [
        ("glimmer.workers.sampling.rules.PenaltyCounts._grow", False),  # while rows change
        ("glimmer.workers.forward.hidden_states", False),
        ("glimmer.workers.step.HostCopy", True),  # when all is done
    ],
)
def test_a_step_without_memory_fails_alone(
    tiny_model: Path, make_runner: Any, monkeypatch: pytest.MonkeyPatch, place: str, is_known: bool
) -> None:
    """The next plan may not fit the rows any more; the one after that frees them."""
    runner = make_runner(tiny_model)
    chunk = PrefillChunk(0, 0, [3, 1, 4], sample=True)
    fresh = runner.run(plan([admit(0, [0])], [chunk])).rows
    new = [admit(1, [1], presence_penalty=1.0)]
    with monkeypatch.context() as patched:
        patched.setattr(place, full)
        failed = runner.run(plan(new, [PrefillChunk(1, 0, [1, 2], sample=False)], [0]))
    assert (failed.rows, failed.error) == (
        [],
        "the GPU ran out of memory: CUDA out of memory.",
    )
    behind = runner.run(plan(prefill=[PrefillChunk(1, 2, [3], sample=True)], decode=[0]))
    assert (len(behind.rows), bool(behind.error)) == ((2, False) if is_known else (0, True))
    again = runner.run(plan([admit(2, [2])], [PrefillChunk(2, 0, [3, 1, 4], True)], freed=[0, 1]))
    assert again.rows == fresh
    with pytest.raises(ValueError, match="row 1"):  # nothing has failed before this one
        runner.run(plan(decode=[1]))


def full(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


def test_memory_may_fail_again_at_once(
    tiny_model: Path, make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind each of the steps that failed there may be one that was made without knowing."""
    runner = make_runner(tiny_model)
    new = plan([admit(0, [0])], [PrefillChunk(0, 0, [3, 1, 4], sample=True)])
    with monkeypatch.context() as patched:
        patched.setattr("glimmer.workers.forward.hidden_states", full)
        assert [bool(runner.run(new).error) for _ in range(2)] == [True, True]
    behind = plan(prefill=[PrefillChunk(0, 3, [1], sample=True)])
    assert runner.run(behind).error == "the step before failed"
    with pytest.raises(ValueError, match="row 0"):
        runner.run(behind)


@pytest.mark.parametrize("mtp", [{}, {"mtp_mode": "eagle_with_att", "mtp_step": 2}], ids=str)
def test_wherever_memory_runs_out_others_get_their_tokens(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mtp: dict[str, Any]
) -> None:
    """Requests start over, with rows and pages of steps that failed at any point."""
    sampling = SamplingParams(max_new_tokens=5, temperature=1.0, seed=3, presence_penalty=0.5)
    prompts = [[(7 * n + i) % 150 for i in range(1 + 9 * n % 90)] for n in range(40)]
    limits = {"running_max_req_size": 6, "batch_max_tokens": 48, "chunked_prefill_size": 32}
    engine = Engine(tiny_model, tmp_path, page_size=16, **limits, **mtp)
    expected = engine.generate(prompts, sampling)
    engine = Engine(tiny_model, tmp_path, page_size=16, **limits, **mtp)
    engine.may_fail = True
    chance = random.Random(5)

    def fail_sometimes(function: Any) -> Any:
        def call(*args: Any, **values: Any) -> Any:
            return (full if chance.random() < 0.006 else function)(*args, **values)

        return call

    modules = ("rows", "inputs", "sampling.rules", "sampling.sampler")
    places = [*(f"{module}.to_device" for module in modules), "inputs.ints_to_device"]
    places += ["forward.hidden_states", "forward.build_batch", "step.HostCopy"]
    places += ["sampling.sampler.sampling.uniform"]
    for place in places:
        path = f"glimmer.workers.{place}"
        monkeypatch.setattr(path, fail_sometimes(resolve_name(path)))
    found = engine.generate(prompts, sampling)
    ended = [m for m in engine.messages if isinstance(m, Finished)]
    failed = {m.request_id for m in ended if m.reason == "error"}
    assert 0 < len(failed) < len(prompts)
    for number, outputs in enumerate(expected):
        if number in failed:
            assert found[number] == outputs[: len(found[number])]
        else:
            assert found[number] == outputs


@pytest.mark.gpu
@pytest.mark.parametrize("least", [(1 << 20) + 512, 512])  # bytes: of large blocks, of all
def test_a_full_card_fails_a_step_alone(tiny_model: Path, make_runner: Any, least: int) -> None:
    """Large tensors find no memory in the forward pass, small ones before it. A prompt of so many
    tokens runs without graphs, the steps after it with graphs."""
    runner = make_runner(
        tiny_model, device="cuda", data_type="bfloat16", graph_max_batch_size=8,
        max_req_total_len=4096, batch_max_tokens=4096,
    )  # fmt: skip
    assert runner.forward.decode_graphs.padded([0], 0) == [0]
    assert not runner.forward.layer_graphs.covers(2500)
    chunk = PrefillChunk(0, 0, [7 * i % 150 for i in range(2500)], sample=True)
    new = [admit(0, list(range(41)), presence_penalty=1.0)]

    def generate() -> list[Any]:
        steps = [plan(new, [chunk], freed=[0]), *[plan(decode=[0])] * 4]
        return [runner.run(step).rows for step in steps]

    fresh = generate()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    held = []
    try:
        for size in sorted({(1 << 20) + 512, least}, reverse=True):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        failed = runner.run(plan(new, [chunk], freed=[0]))
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failed.rows == []
    assert "ran out of memory" in failed.error
    assert generate() == fresh
