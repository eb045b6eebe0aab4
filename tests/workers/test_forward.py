"""Which graphs a rank captures, with captures that only run what they are given."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.sampling import SamplingParams
from glimmer.workers import forward as forward_module
from glimmer.workers.forward import Forward

GREEDY = SamplingParams(max_new_tokens=9)


class Graph:
    """Replays do nothing: what they would have left is there from the capture, or is not read."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Graph, Any]]:
    """(graph, pool) of every capture, in their order."""
    found: list[tuple[Graph, Any]] = []

    @contextlib.contextmanager
    def record(graph: Graph, pool: Any) -> Iterator[None]:
        found.append((graph, pool))
        yield

    def measure(run: Any) -> int:
        run()
        return 1 << 20

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(forward_module, "measure_peak", measure)
    return found


@pytest.mark.parametrize("mtp_step", [0, 2])
def test_every_size_is_captured_in_one_pool(
    tiny_model: Path, make_runner: Any, captured: list[Any], mtp_step: int
) -> None:
    drafts = {"mtp_mode": "eagle_with_att", "mtp_step": mtp_step} if mtp_step else {}
    limits = {"graph_max_batch_size": 12, "batch_max_tokens": 100, **drafts}
    runner = make_runner(tiny_model, **limits)
    reports: list[tuple[int, int]] = []
    with torch.inference_mode():
        needed = runner.forward.prepare_graphs()
        runner.forward.capture_graphs(lambda *done: reports.append(done))
    decode, layers = runner.forward.decode_graphs, runner.forward.layer_graphs
    assert layers.sizes == [16, 32, 64, 100]
    pieces = len(layers.sizes) * (runner.spec.num_layers + 1)
    assert len(captured) == decode.num_steps * (2 if mtp_step else 1) + pieces
    assert {pool for _, pool in captured} == {"pool"}
    assert needed > (decode.num_steps + len(layers.sizes)) << 20
    assert [done for done, total in reports if done == total] == [decode.num_steps, 4]
    assert decode.padded([3] * 12, mtp_step) == [3] * 12
    assert decode.padded([3] * 13, mtp_step) is None
    assert layers.covers(100)
    assert not layers.covers(101)


def test_steps_replay_the_graphs_that_cover_them(
    tiny_model: Path, make_runner: Any, captured: list[Any]
) -> None:
    limits = {"graph_max_batch_size": 4, "batch_max_tokens": 40}
    runner = make_runner(tiny_model, **limits)
    with torch.inference_mode():
        runner.forward.prepare_graphs()
        runner.forward.capture_graphs(lambda *_: None)
    pieces = runner.spec.num_layers + 1

    def replays(plan: StepPlan) -> int:
        before = sum(graph.replays for graph, _ in captured)
        runner.run(plan)
        return sum(graph.replays for graph, _ in captured) - before

    admits = [RowAdmit(row, GREEDY, [row], 0, 0, []) for row in range(3)]
    first = [PrefillChunk(0, 0, [1, 2, 3], sample=True)]
    assert replays(StepPlan(0, 0, [], admits, [], first, [])) == pieces
    beside = [PrefillChunk(1, 0, [4] * 9, sample=True)]
    assert replays(StepPlan(0, 1, [], [], [], beside, [0])) == pieces
    long = [PrefillChunk(2, 0, [5] * 41, sample=True)]
    assert replays(StepPlan(0, 2, [], [], [], long, [])) == 0
    scratch_row = runner.table.scratch_row
    assert runner.forward.decode_graphs.padded([2, 0, 1], 0) == [2, 0, 1, scratch_row]
    assert replays(StepPlan(0, 3, [], [], [], [], [0, 1])) == 1
    with runner.forward.without_graphs():
        assert replays(StepPlan(0, 4, [], [], [], [], [0, 1])) == 0


class RerunGraph(Graph):
    """Replays run the captured functions again, and put their results where the first ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def replay(self) -> None:
        super().replay()
        for function, results in self.calls:
            overwrite(results, function())


def overwrite(old: Any, new: Any) -> None:
    if isinstance(old, torch.Tensor):
        old.copy_(new)
    elif old is not None:
        for pair in zip(old, new, strict=True):
            overwrite(*pair)


@pytest.mark.parametrize("mtp_step", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replayed_decode_steps_change_no_token(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    captured: list[Any],
    mtp_step: int,
    temperature: float,
) -> None:
    """On a CPU: padding, buffers and both parts of a step, in batches of several sizes."""

    def recording(function: Any) -> Any:
        def call(*args: Any) -> Any:
            results = function(*args)
            if captured and captured[-1][0].is_open:
                captured[-1][0].calls.append((partial(function, *args), results))
            return results

        return call

    @contextlib.contextmanager
    def record(graph: Any, pool: Any) -> Iterator[None]:
        captured.append((graph, pool))
        graph.is_open = True
        yield
        graph.is_open = False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RerunGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    for name in ("_decode", "_draft"):
        monkeypatch.setattr(Forward, name, recording(getattr(Forward, name)))
    sampling = SamplingParams(max_new_tokens=12, temperature=temperature, seed=3)
    prompts = [[(5 * i + n) % 150 for i in range(n)] for n in (1, 3, 17, 40, 65)]
    options: dict[str, Any] = {"running_max_req_size": 8, "graph_max_batch_size": 6}
    if mtp_step:
        options |= {"mtp_mode": "eagle_with_att", "mtp_step": mtp_step, "mtp_fixed_step": True}
    outputs = []
    for has_graphs in (False, True):
        engine = Engine(tiny_model, tmp_path, **options)
        forward = engine.runner.forward
        if has_graphs:
            with torch.inference_mode():
                forward.prepare_graphs()
                forward.capture_graphs(lambda *_: None)
        with forward.without_graphs(decode=False):  # graphs of layers are not run again
            outputs.append([engine.generate(prompts[:count], sampling) for count in (5, 3, 1)])
    assert outputs[0] == outputs[1]
    assert sum(graph.replays > 0 for graph, _ in captured if graph.calls) >= 3
