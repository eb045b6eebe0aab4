"""A worker without a model that answers each plan at once, so that only the overhead remains.

It speaks the worker's whole protocol. Its tokens repeat a typical agent's reply: text, a call of
the tool `call` with a string argument, more text. Only `glimmer bench overhead` starts it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ...shared.lifecycle import run_child, start_child
from ...shared.messages import Ready, RowResult, Shutdown, StepPlan, StepResult
from ...shared.transport import Receiver, Sender, scheduler_address, worker_address

_NUM_PAGES = 1 << 16
_TEXT = list(range(40, 80))  # some printable tokens of a byte-level vocabulary
_CALL = "<tool_call>call<arg_key>name</arg_key><arg_value>"
_CALL_END = "</arg_value></tool_call>"


def cycle(model_dir: Path) -> list[int]:
    """The tokens that are repeated. They close reasoning in each cycle, which has an effect only
    in the first."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    end, call, call_end = (tokenizer.encode(t).ids for t in ("</think>", _CALL, _CALL_END))
    return [*_TEXT, *end, *_TEXT, *call, *_TEXT, *call_end]


def answer(plan: StepPlan, tokens: Sequence[int]) -> StepResult:
    """One token per sampling row, different from step to step."""
    rows = sum(chunk.sample for chunk in plan.prefill) + len(plan.decode)
    token = tokens[plan.step % len(tokens)]
    return StepResult(plan.epoch, plan.step, [RowResult([token])] * rows)


def main() -> int:
    """Answer plans until a Shutdown arrives."""
    child = start_child("worker")
    tokens = cycle(Path(child.config.model_dir))
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
                    scheduler.send(answer(message, tokens))
                elif isinstance(message, Shutdown):
                    return 0


if __name__ == "__main__":
    sys.exit(run_child(main))
