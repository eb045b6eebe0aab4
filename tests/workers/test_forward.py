"""Which graphs a rank captures, with captures that only run what they are given."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.sampling import SamplingParams
from glimmer.workers import forward

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
    monkeypatch.setattr(forward, "measure_peak", measure)
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
