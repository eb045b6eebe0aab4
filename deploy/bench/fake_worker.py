"""A worker that answers each plan at once with a made-up token: what remains is our own overhead.

Speaks the worker's protocol in full; holds no model. Only `glimmer bench overhead` starts it.
"""

import sys

from ...shared.lifecycle import run_child, start_child
from ...shared.messages import Ready, RowResult, Shutdown, StepPlan, StepResult
from ...shared.transport import Receiver, Sender, scheduler_address, worker_address

_NUM_PAGES = 1 << 16
_FIRST_TOKEN = 40  # some printable ones of a byte-level vocabulary
_NUM_TOKENS = 40


def answer(plan: StepPlan) -> StepResult:
    """One token per sampling row, different from step to step."""
    rows = sum(chunk.sample for chunk in plan.prefill) + len(plan.decode)
    token = _FIRST_TOKEN + plan.step % _NUM_TOKENS
    return StepResult(plan.epoch, plan.step, [RowResult([token])] * rows)


def main() -> int:
    """Serve plans until told to stop."""
    child = start_child("worker")
    scheduler = Sender.connect(scheduler_address(child.runtime_dir))
    address = worker_address(child.runtime_dir, child.epoch, child.index)
    with Receiver.bind(address) as inbox:
        scheduler.send(child.hello())
        ready = Ready("worker", child.index, child.epoch, _NUM_PAGES)
        scheduler.send(ready)
        child.launcher.send(ready)
        while True:
            for message in inbox.receive(None):
                if isinstance(message, StepPlan) and child.index == 0:
                    scheduler.send(answer(message))
                elif isinstance(message, Shutdown):
                    return 0


if __name__ == "__main__":
    sys.exit(run_child(main))
