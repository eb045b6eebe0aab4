"""The worker process as its peers see it: greetings, results in order, exit codes, reasons."""

from pathlib import Path
from typing import Any

import pytest
from glimmer.shared.messages import (
    Hello,
    PeerLost,
    PrefillChunk,
    Progress,
    Ready,
    RowAdmit,
    Shutdown,
    StepPlan,
    StepResult,
    WorkerFailed,
)
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.loop import serve

GREEDY = SamplingParams(max_new_tokens=4)


def prefill(step: int = 0, page: int = 0, epoch: int = 0) -> StepPlan:
    chunk = PrefillChunk(0, 0, [5, 6, 7], sample=True)
    return StepPlan(epoch, step, [], [RowAdmit(0, GREEDY, [page], 0, 0, [])], [], [chunk], [])


class Inbox:
    """Gives one batch of messages per call."""

    def __init__(self, *batches: list[Any]) -> None:
        self.batches = list(batches)

    def receive(self, timeout_s: float | None) -> list[Any]:
        return self.batches.pop(0) if self.batches else []


class Outbox:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


def test_a_whole_life(tiny_model: Path, start_group: Any) -> None:
    group = start_group(tiny_model, load_workers=2)
    ready = group.wait_for(Ready)[0]
    assert group.wait_for(Ready, at="launcher") == [ready]
    assert ready.num_pages == 16384 // 64
    for heard in (group.heard_by_scheduler, group.heard_by_launcher):
        assert isinstance(heard[0], Hello)
        assert (heard[0].role, heard[0].index) == ("worker", 0)
        assert heard[0].config_hash == group.config.config_hash()
    progress = [m for m in group.heard_by_launcher if isinstance(m, Progress)]
    loaded = [m for m in progress if m.stage == "loading weights"]
    assert loaded
    assert loaded[-1].done == loaded[-1].total > 0
    group.send(prefill(1))
    group.send(StepPlan(0, 2, [], [], [], [], [0]))  # sent before the first result is there
    first, second = group.wait_for(StepResult, 2)
    assert (first.step, second.step) == (1, 2)
    assert len(first.rows[0].token_ids) == len(second.rows[0].token_ids) == 1
    group.send(Shutdown(0))
    assert group.exit_codes() == [0]


def test_a_failing_step_ends_the_process_with_a_reason(tiny_model: Path, start_group: Any) -> None:
    group = start_group(tiny_model)
    group.wait_for(Ready)
    group.send(prefill(page=9999))
    failed = group.wait_for(WorkerFailed, at="launcher")[0]
    assert (failed.epoch, failed.rank) == (0, 0)
    assert "pages [9999] of 256" in failed.reason
    assert group.exit_codes() == [1]


def test_a_bad_model_ends_the_start_with_its_own_exit_code(
    tmp_path: Path, tiny_model: Path, start_group: Any
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    group = start_group(tmp_path)
    assert "has neither" in group.wait_for(WorkerFailed, at="launcher")[0].reason
    assert group.exit_codes() == [4]


def test_only_rank_0_answers(tiny_model: Path, make_runner: Any) -> None:
    runner = make_runner(tiny_model)
    inbox: Any = Inbox([prefill(), Shutdown(0)])
    assert serve(runner, inbox, None) == 0
    outbox: Any = Outbox()
    inbox = Inbox([prefill(3)], [Shutdown(0)])
    assert serve(runner, inbox, outbox) == 0
    assert [m.step for m in outbox.sent] == [3]


def test_what_is_not_for_it_is_skipped(
    tiny_model: Path, make_runner: Any, caplog: pytest.LogCaptureFixture
) -> None:
    outbox: Any = Outbox()
    lost = PeerLost("frontend", 0, "gone")
    inbox: Any = Inbox([prefill(epoch=7), lost], [Shutdown(0)])
    assert serve(make_runner(tiny_model), inbox, outbox) == 0
    assert outbox.sent == []
    assert "unexpected PeerLost" in caplog.text


def test_a_step_cut_short_by_the_shutdown_of_others_is_no_failure(
    tiny_model: Path, make_runner: Any
) -> None:
    runner = make_runner(tiny_model)
    broken = prefill(page=9999)
    late: Any = Inbox([broken], [Shutdown(0)])
    assert serve(runner, late, None) == 0
    alone: Any = Inbox([broken], [])
    with pytest.raises(ValueError, match="9999"):
        serve(runner, alone, None)
