"""The real scheduler core and one real rank in this process: no sockets, no clock.

Results are delivered one step late, so the look-ahead of production is exercised.
"""

import random
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glimmer.scheduler.core import Outgoing, Scheduler
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import (
    AnyMessage,
    Finished,
    Grammar,
    Message,
    Ready,
    StepPlan,
    Submit,
    Tokens,
)
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.startup import load_runner
from glimmer.workers.step import PendingStep

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
    """Generates token ids; `preemptions`, `cached_tokens` and `accepted_tokens` (outputs that were
    drafts) say what happened on the way.

    `hints` are outputs by request id that are known already: put in place of most drafts, they make
    long runs of right ones, whatever the draft layer is.
    """

    may_fail = False  # requests may end with an error, or with one of their grammar

    def __init__(self, model_dir: Path, runtime_dir: Path, **changes: Any) -> None:
        config = ServeConfig(model_dir=str(model_dir), **{**SETTLED, **changes})
        self.runner = load_runner(config, 0, 0, runtime_dir, lambda *_: None)
        self.core = Scheduler(config)
        self.core.step(0, [Ready("worker", 0, 0, self.runner.num_pages)])
        self._reset()

    def _reset(self) -> None:
        self.messages: list[Message] = []  # all of them, in order
        self.hints: Mapping[int, Sequence[int]] = {}
        self._now_ns = 0
        self._rng = random.Random(1)
        self.cached_tokens = self.accepted_tokens = 0

    @property
    def preemptions(self) -> int:
        return self.core.heartbeat(0, 0.0).preemptions

    def generate(
        self, prompts: Sequence[list[int]], sampling: SamplingParams, **submit: Any
    ) -> list[list[int]]:
        """All prompts at once -> their output ids. Every request must end by itself."""
        outputs = self.run(
            [Submit(n, 0, prompt, sampling, **submit) for n, prompt in enumerate(prompts)]
        )
        return list(outputs.values())

    def generate_each(
        self,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        grammars: Sequence[Grammar | None],
    ) -> list[list[int]]:
        """The same with a grammar for each."""
        pairs = enumerate(zip(prompts, grammars, strict=True))
        outputs = self.run(
            [Submit(n, 0, p, sampling, grammar=grammar) for n, (p, grammar) in pairs]
        )
        return list(outputs.values())

    def run(self, prompts: Sequence[Submit]) -> dict[int, list[int]]:
        """Any requests at once -> their output ids by request id, in the order given."""
        inbox: list[AnyMessage] = list(prompts)
        outputs: dict[int, list[int]] = {submit.request_id: [] for submit in prompts}
        finished: set[int] = set()
        steps: deque[PendingStep] = deque()  # launched, and read one step later, as beside a GPU
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
                    reasons = ["stop", "length"]
                    if self.may_fail:
                        reasons += ["error", "invalid"]
                    assert message.reason in reasons, message
                    assert message.request_id not in finished, "two endings"
                    finished.add(message.request_id)
                    self.cached_tokens += message.num_cached_tokens
                    self.accepted_tokens += message.mtp_accepted_tokens
            if plan is not None:
                steps.append(self.runner.launch(plan))
                self._hint()
            if steps and (plan is None or len(steps) == 2):
                inbox.append(self.runner.finish(steps.popleft()))
        late = [*inbox, *(self.runner.finish(step) for step in steps)]
        for result in late:  # of steps that turned out to be one too many
            self._step([result])
        return outputs

    def _hint(self) -> None:
        if not self.hints:
            return
        table = self.runner.table
        assert table.max_drafts, "hints are drafts"
        for request in self.core._running:
            done = int(table.num_outputs[request.row])
            following = self.hints[request.request_id][done : done + table.max_drafts]
            for number, token in enumerate(following):
                if self._rng.random() < 0.8:
                    table.drafts[request.row, number] = token

    def _step(self, inbox: list[AnyMessage]) -> tuple[StepPlan | None, list[Outgoing]]:
        self._now_ns += self._rng.randint(5, 15)  # draft lengths are chosen by such times
        plan, outbox = self.core.step(self._now_ns, inbox)
        self.core.check_integrity()
        self.messages += [*inbox, *(o.message for o in outbox), *([plan] if plan else [])]
        return plan, outbox
