"""Building one StepPlan: decode rows first, then prompt chunks, under a token budget.

A `StepBuilder` lives for one plan. It moves requests forward (positions planned, states) as it
adds them; which ones are offered to it, and in which order, is decided in `core.py`.
"""

from collections.abc import Callable

from ..shared.messages import PagesAppended, PrefillChunk, RowAdmit, StepPlan
from .admission import StepLimits
from .draft import DraftPolicy
from .memory import Memory
from .request import Request, RequestState
from .results import Flight


class StepBuilder:
    """One plan in the making, and its remaining token budget."""

    def __init__(self, memory: Memory, limits: StepLimits, drafts: DraftPolicy) -> None:
        self._memory = memory
        self._limits = limits
        self._drafts = drafts
        self.budget = limits.max_tokens
        self._num_drafts = 0
        self.prefill_waits: list[Request] = []  # rows whose prompt is not fully planned
        self.decoding: list[Request] = []  # parallel to the plan's `decode`
        self.chunked: list[tuple[Request, int]] = []  # parallel to `prefill`: request, start
        self.sampled_chunks: list[Request] = []
        self._admitted: list[RowAdmit] = []
        self._appended: list[PagesAppended] = []
        self._prefill: list[PrefillChunk] = []
        self._decode: list[int] = []

    def add_decodes(self, running: list[Request], reclaim: Callable[[Request], bool]) -> None:
        """One token, and some drafts to verify, for each row that decodes, oldest first.
        `reclaim(request)` makes a page available, or returns False when `request` itself had to
        give way. This is the hot loop: it runs for every row in every step."""
        decoding, prefilling = RequestState.DECODE, RequestState.PREFILL
        if self._drafts.longest:
            num_rows = sum(request.state is decoding for request in running)
            self._num_drafts = self._drafts.choose(num_rows, self.budget)
        memory, width = self._memory, 1 + self._num_drafts
        budget = self.budget
        ending: list[Request] = []
        for request in running.copy():  # reclaim changes the list
            state = request.state
            if state is prefilling:
                self.prefill_waits.append(request)
            if state is not decoding or budget < width:
                continue
            num_kv = request.num_kv + width
            if num_kv > request.kv_capacity:
                pages = memory.make_room(request, num_kv, reclaim)
                if pages is None:
                    continue
                if pages:
                    self._appended.append(PagesAppended(request.row, pages))
                num_kv = min(num_kv, request.kv_capacity)
            budget -= width
            request.num_kv = num_kv
            request.num_planned += 1
            request.max_planned += width
            self._decode.append(request.row)
            self.decoding.append(request)
            if request.num_planned == request.max_total_tokens:
                ending.append(request)
        for request in ending:  # not before: reclaim may take the row of one that is LAST
            request.move(RequestState.LAST)
        self.budget = budget

    def can_chunk(self, num_tokens: int) -> bool:
        """Whether a request with `num_tokens` still to prefill would get a chunk now."""
        return self.budget >= (num_tokens if self._limits.whole_prompts else 1)

    def admit(self, request: Request) -> None:
        """A request that got its row and pages."""
        self._admitted.append(self._memory.row_admit(request))

    def add_chunk(self, request: Request) -> None:
        """The next chunk of a row in prefill, as long as budget and chunk size allow."""
        start, tokens = request.num_kv, request.tokens
        left = len(tokens) - start
        limit = left if self._limits.whole_prompts else self._limits.chunk_size
        count = min(left, limit, self.budget)
        if count < 1 or (count < left and self._limits.whole_prompts):
            return
        end = start + count
        sample = end == len(tokens)
        next_id = -1 if sample else tokens[end]
        ids = tokens[start:end].tolist()
        self._prefill.append(PrefillChunk(request.row, start, ids, sample, next_id))
        self.chunked.append((request, start))
        self.budget -= count
        request.num_kv = end
        if sample:
            self.sampled_chunks.append(request)
            request.num_planned += 1
            request.max_planned += 1
            is_last = request.num_planned == request.max_total_tokens
            request.move(RequestState.LAST if is_last else RequestState.DECODE)

    def build(self, epoch: int, step: int, freed: list[int]) -> StepPlan | None:
        """The plan, or None if there is nothing to run (then `freed` must be kept)."""
        if not self._decode and not self._prefill:
            return None
        if not self._decode:  # rows that sample their first token make drafts, too
            num_rows = len(self.sampled_chunks)
            self._num_drafts = self._drafts.choose(num_rows, self._limits.max_tokens)
        for request, _ in self.chunked:
            self._memory.publish_planned(request)
        return StepPlan(
            epoch=epoch,
            step=step,
            freed=freed,
            admitted=self._admitted,
            appended=self._appended,
            prefill=self._prefill,
            decode=self._decode,
            num_drafts=self._num_drafts,
        )

    def flight(self, plan: StepPlan) -> Flight:
        """What to remember of the plan that was built."""
        sampling = self.sampled_chunks + self.decoding
        return Flight(plan.step, sampling, self.chunked, len(plan.decode), plan.num_drafts)
