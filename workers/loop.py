"""The process of one rank: load, say Ready, then run plans in the order in which they come.

Rank 0 answers the scheduler. Any failure ends the process with a reason to the launcher, which
restarts the whole group: a rank that failed within a step may be out of step with the others.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ..shared.errors import StartError
from ..shared.fingerprint import check_unchanged
from ..shared.lifecycle import Child
from ..shared.log import dropped_lines
from ..shared.messages import Counts, Progress, Ready, Shutdown, StepPlan, WorkerFailed
from ..shared.transport import Receiver, Sender, scheduler_address, worker_address
from .self_test import self_test
from .startup import load_runner
from .step import ModelRunner, PendingStep

logger = logging.getLogger(__name__)
_IDLE_S = 1.0  # an idle worker looks after its inbox this often
_POLL_S = 3e-5  # between looks at a step on a GPU and at the inbox


def run_worker(child: Child) -> int:
    """Serve until Shutdown; returns 0. Any failure is reported to the launcher and raised again."""
    scheduler = Sender.connect(scheduler_address(child.runtime_dir))
    scheduler.send(child.hello())
    try:
        return _load_and_serve(child, scheduler)
    except Exception as error:
        reason = str(error) if isinstance(error, StartError) else repr(error)
        child.launcher.send(WorkerFailed(child.epoch, child.index, reason))
        raise
    finally:
        scheduler.close()
        child.launcher.close()


def _load_and_serve(child: Child, scheduler: Sender) -> int:
    num_dropped = 0

    def report_losses() -> None:
        nonlocal num_dropped
        if dropped_lines() != num_dropped:
            num_dropped = dropped_lines()
            counts = Counts("worker", child.index, os.getpid(), [float(num_dropped)])
            child.launcher.send(counts)

    def report(stage: str, done: int, total: int) -> None:
        child.launcher.send(Progress("worker", child.index, stage, done, total))

    runner = load_runner(child.config, child.index, child.epoch, Path(child.runtime_dir), report)
    report("self-test", 0, 0)
    self_test(runner, child.config)
    check_unchanged(child.config)  # again: the files may have changed while they were read
    with Receiver.bind(worker_address(child.runtime_dir, child.epoch, child.index)) as inbox:
        ready = Ready("worker", child.index, child.epoch, num_pages=runner.num_pages)
        logger.info("rank %d is ready with %d KV pages", child.index, runner.num_pages)
        scheduler.send(ready)
        child.launcher.send(ready)
        return serve(runner, inbox, scheduler if child.index == 0 else None, report_losses)


def serve(
    runner: ModelRunner,
    inbox: Receiver,
    scheduler: Sender | None,
    when_idle: Callable[[], None] = lambda: None,
) -> int:
    """Run plans until Shutdown; results go to `scheduler` unless it is None (ranks above 0). On a
    GPU the next plan is launched while the last one runs. A step that fails because the other ranks
    have shut down already is not a failure. `when_idle` is called about every second without work.
    """
    pending: deque[PendingStep] = deque()
    while True:
        messages = inbox.receive(0 if pending else _IDLE_S)
        if not messages and not pending:
            inbox.repair()
            when_idle()
        for message in messages:
            match message:
                case StepPlan() if message.epoch == runner.epoch:
                    try:
                        pending.append(runner.launch(message))
                        _answer(runner, pending, scheduler)
                    except Exception:
                        if any(isinstance(late, Shutdown) for late in inbox.receive(0)):
                            return 0
                        raise
                case Shutdown():
                    return 0
                case _:
                    logger.warning("unexpected %s", type(message).__name__)
        if pending:
            _answer(runner, pending, scheduler)
            time.sleep(_POLL_S if pending else 0)


def _answer(runner: ModelRunner, pending: deque[PendingStep], scheduler: Sender | None) -> None:
    """Send the results of steps that are done, in order."""
    while pending and pending[0].is_done:
        result = runner.finish(pending.popleft())
        if scheduler is not None and not scheduler.send(result):
            raise RuntimeError("the scheduler does not read results")
