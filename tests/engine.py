"""The real scheduler core and one real rank in this process: no sockets, no clock.

Results are delivered one step late, so the look-ahead of production is exercised.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glimmer.scheduler.core import Outgoing, Scheduler
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import (
    AnyMessage,
    Finished,
    Message,
    Ready,
    StepPlan,
    StepResult,
    Submit,
    Tokens,
)
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.runner import load_runner

SETTLED: dict[str, Any] = {
    "device": "cpu",
    "data_type": "float32",
    "max_req_total_len": 2048,
    "max_total_token_num": 16384,
    "running_max_req_size": 24,
    "batch_max_tokens": 2048,
    "chunked_prefill_size": 2048,
    "eos_id": (),
}


class Engine:
    """Generates token ids; `preemptions` and `cached_tokens` say what happened on the way."""

    def __init__(self, model_dir: Path, runtime_dir: Path, **changes: Any) -> None:
        config = ServeConfig(model_dir=str(model_dir), **{**SETTLED, **changes})
        self.runner = load_runner(config, 0, 0, runtime_dir, lambda *_: None)
        self.core = Scheduler(config)
        self.core.step(0, [Ready("worker", 0, 0, self.runner.num_pages)])
        self.messages: list[Message] = []  # all of them, in order
        self._now_ns = 0
        self.cached_tokens = 0

    @property
    def preemptions(self) -> int:
        return self.core.heartbeat(0, 0.0).preemptions

    def generate(
        self, prompts: Sequence[list[int]], sampling: SamplingParams, **submit: Any
    ) -> list[list[int]]:
        """All prompts at once -> their output ids. Every request must end by itself."""
        inbox: list[AnyMessage] = [
            Submit(number, 0, prompt, sampling, **submit) for number, prompt in enumerate(prompts)
        ]
        outputs: list[list[int]] = [[] for _ in prompts]
        finished: set[int] = set()
        results: deque[StepResult] = deque()
        while len(finished) < len(prompts):
            plan, outbox = self._step(inbox)
            inbox = []
            for outgoing in outbox:
                message = outgoing.message
                if isinstance(message, Tokens):
                    for row in message.rows:
                        assert row.request_id not in finished, "a token after the end"
                        outputs[row.request_id] += row.token_ids
                elif isinstance(message, Finished):
                    assert message.reason in ("stop", "length"), message
                    assert message.request_id not in finished, "two endings"
                    finished.add(message.request_id)
                    self.cached_tokens += message.num_cached_tokens
            if plan is not None:
                results.append(self.runner.run(plan))
            if results and (plan is None or len(results) == 2):
                inbox = [results.popleft()]
        while results:  # of steps that turned out to be one too many
            self._step([results.popleft()])
        self.core.check_integrity()
        return outputs

    def _step(self, inbox: list[AnyMessage]) -> tuple[StepPlan | None, list[Outgoing]]:
        self._now_ns += 1
        plan, outbox = self.core.step(self._now_ns, inbox)
        self.messages += [*inbox, *(o.message for o in outbox), *([plan] if plan else [])]
        return plan, outbox
