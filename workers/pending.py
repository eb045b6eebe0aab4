"""A step between its launch and the reading of its result."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..shared.messages import RowResult, StepPlan, TokenLogprob
from .drafting import Step
from .memory.device import HostCopy
from .sampling.sampler import Sampled


@dataclass(eq=False)
class PendingStep:
    """A step that was launched. On CUDA it may still be running."""

    plan: StepPlan
    prompt_logprobs: list[list[TokenLogprob]]
    rows: Sequence[int] = ()  # that sampled
    copy: HostCopy | None = None  # of what they sampled; None: it failed
    sampled: Sampled | None = None  # on rank 0
    drafted: Step | None = None  # with drafts
    results: list[RowResult] = field(default_factory=list)  # once read
    error: str = ""  # it produced nothing

    @property
    def is_done(self) -> bool:
        """Whether its result can be read without waiting."""
        return self.copy is None or self.copy.is_done

    def start_copy(self, device: torch.device) -> None:
        """Send to the host what it wants to know: on rank 0 what was sampled and how much of it
        counts, elsewhere nothing but that the step is done."""
        tensors = []
        if self.sampled is not None:
            counts = [] if self.drafted is None else [self.drafted.num_tokens]
            tensors = [*self.sampled.tensors(), *counts]
        self.copy = HostCopy(tensors, device)

    def read(self) -> list[tuple[int, int]]:
        """Wait for the copy and make `results`. -> (row, token) of all tokens that count, in their
        order. Raises FloatingPointError naming a row whose logits are not finite numbers."""
        if self.copy is None:
            return []  # it may have failed after it sampled
        host = self.copy.wait()
        if self.sampled is None:
            return []  # nothing was sampled, or not here
        ids, logprobs = self.sampled.read(host[: len(self.sampled.tensors())])
        if self.drafted is not None:
            self.results, pairs = self.drafted.results(ids, logprobs, host[-1].tolist())
            return pairs
        found = zip(ids, logprobs, strict=True)
        self.results = [RowResult([token_id], entries) for token_id, entries in found]
        return list(zip(self.rows, ids, strict=True))
