"""Fakes that other tests use: a worker that runs plans over a shadow of KV memory, and a scheduler
with such a worker (`FakeEngine`).

`FakeWorker` answers any StepPlan as a real rank 0 would, at once and deterministically. It checks
everything that a real worker has to trust: each page in a row's table holds exactly the row's
prefix, plans are in order, rows and pages are in use or free as the plan says. The next token is a
hash of all tokens before it, so each stream has one right answer (`oracle`).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from glimmer.scheduler.core import Outgoing, Scheduler
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import (
    Finished,
    Grammar,
    Message,
    PrefillChunk,
    Ready,
    RowAdmit,
    RowResult,
    StepPlan,
    StepResult,
    Submit,
    TokenLogprob,
    Tokens,
)
from glimmer.shared.sampling import SamplingParams

# Fields of a Heartbeat while one request runs.
BEAT: dict[str, Any] = {
    "steps": 1,
    "num_running": 1,
    "num_waiting": 0,
    "num_paused": 0,
    "pages_total": 10,
    "pages_free": 5,
    "pages_cached": 0,
    "worker_ready": True,
    "preemptions": 0,
    "prefix_queries": 0,
    "prefix_hits": 0,
    "generated_tokens": 0,
    "malformed_messages": 0,
}

_MASK = (1 << 61) - 1
Slot = tuple[int, int]  # token, hash of the whole prefix up to it
EMPTY: Slot = (-1, -1)


GRAMMAR_ERROR = "the grammar is too complex"


def grammar(fails_at: int = -1) -> Grammar:
    """A grammar for fakes: a row with it cannot sample its output number `fails_at` (from 0)."""
    return Grammar(str(fails_at), "guided_json")


def fails_at(grammar: Grammar | None) -> int:
    """The output at which a row with this grammar fails; -1: it does not."""
    return -1 if grammar is None else int(grammar.text)


def mix(state: int, value: int) -> int:
    """A 61-bit hash step that is the same in every process."""
    return ((state ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 + (state >> 29)) & _MASK


def next_token(
    prefix_hash: int, sampling: SamplingParams, counted: int, num_outputs: int, vocab_size: int
) -> int:
    """The right token after a prefix. It depends on the whole prefix, on the seed unless
    greedy, on the tokens that penalties count, and obeys min_new_tokens."""
    state = mix(prefix_hash, sampling.seed if sampling.temperature > 0 else 0)
    if sampling.uses_penalties:
        state = mix(state, counted)
    token = mix(state, 7) % vocab_size
    while num_outputs < sampling.min_new_tokens and token in sampling.stop_token_ids:
        token = (token + 1) % vocab_size
    return token


def oracle(
    prompt_ids: list[int],
    sampling: SamplingParams,
    limit: int,
    vocab_size: int,
    salt: int = 0,
    grammar: Grammar | None = None,
) -> tuple[list[int], str]:
    """The outputs that a request must get if nothing stops it early, and the reason of its end.
    `limit` is the longest total length."""
    prefix_hash = salt
    for token in prompt_ids:
        prefix_hash = mix(prefix_hash, token)
    counted = sum(prompt_ids) if sampling.input_penalty else 0
    outputs: list[int] = []
    while True:
        if len(outputs) == fails_at(grammar):
            return outputs, "invalid"
        token = next_token(prefix_hash, sampling, counted, len(outputs), vocab_size)
        outputs.append(token)
        if token in sampling.stop_token_ids:
            return outputs, "stop"
        if len(outputs) == sampling.max_new_tokens or len(prompt_ids) + len(outputs) == limit:
            return outputs, "length"
        prefix_hash = mix(prefix_hash, token)
        counted += token


@dataclass
class FakeRow:
    """State of one row in a worker."""

    sampling: SamplingParams
    pages: list[int]
    slots: list[Slot]  # one per position that holds KV
    salt: int
    counted: int  # sum of the tokens that penalties count
    num_outputs: int
    last_token: int | None = None  # sampled, not yet written
    next_id: int | None = None  # token announced after the last chunk
    matched: list[int] | None = None  # with a grammar: the outputs that it has seen
    fails_at: int = -1  # the output that its grammar cannot have


@dataclass
class FakeWorker:
    """One rank over shadow KV memory. Raises AssertionError for a plan that a real worker must not
    get. `salt_of` gives the cache salt of a request, which plans do not contain: reading a prefix
    of another salt is an error."""

    num_pages: int
    page_size: int
    max_rows: int
    epoch: int = 0
    vocab_size: int = 64
    max_tokens: int | None = None  # budget of a step
    chunk_size: int | None = None
    salt_of: Callable[[SamplingParams], int] = lambda sampling: 0
    mtp_step: int = 0  # most drafts of a step
    max_row_tokens: int = 1 << 30  # what a row's page table can hold
    rows: dict[int, FakeRow] = field(default_factory=dict)
    num_plans: int = 0

    def __post_init__(self) -> None:
        self.memory: list[list[Slot]] = [[EMPTY] * self.page_size for _ in range(self.num_pages)]
        self._last_step: int | None = None

    def run(self, plan: StepPlan) -> StepResult:
        """Apply a plan's changes, run it, and answer."""
        assert plan.epoch == self.epoch, "a plan of another epoch"
        assert self._last_step is None or plan.step == self._last_step + 1, "plans out of order"
        self._last_step = plan.step
        self.num_plans += 1
        for row in plan.freed:
            assert self.rows.pop(row, None) is not None, f"row {row} freed but not in use"
        for admit in plan.admitted:
            self._admit(admit)
        for appended in plan.appended:
            self.rows[appended.row].pages.extend(appended.pages)
        self._check_shape(plan)
        active = [chunk.row for chunk in plan.prefill] + plan.decode
        for number in active:  # all reads before all writes: nothing of this step is visible
            self._check_memory(number)
        logprobs = [self._run_chunk(chunk) for chunk in plan.prefill]
        results = [self._sample(chunk.row) for chunk in plan.prefill if chunk.sample]
        results += [self._decode(number, plan.num_drafts) for number in plan.decode]
        if not any(logprobs):
            logprobs = []
        return StepResult(plan.epoch, plan.step, results, logprobs)

    def fail(self, plan: StepPlan) -> StepResult:
        """Apply a plan's row changes, then fail: the KV that it should have written is garbage, and
        so are its rows. Used for plans that build on a failed one, too."""
        self._last_step = plan.step
        for row in plan.freed:
            assert self.rows.pop(row, None) is not None, f"row {row} freed but not in use"
        for admit in plan.admitted:
            row = FakeRow(admit.sampling, list(admit.pages), [], 0, 0, 0)
            self.rows[admit.row] = row
        for appended in plan.appended:
            self.rows[appended.row].pages.extend(appended.pages)
        spans = [(c.row, c.start, len(c.token_ids)) for c in plan.prefill]
        spans += [(n, len(self.rows[n].slots), 1 + plan.num_drafts) for n in plan.decode]
        for number, start, count in spans:
            row = self.rows[number]
            for position in range(start, min(start + count, len(row.pages) * self.page_size)):
                page = row.pages[position // self.page_size]
                self.memory[page][position % self.page_size] = (-9, position)
            row.last_token, row.slots = None, [(-9, -9)] * start
        return StepResult(plan.epoch, plan.step, [], [], "out of memory")

    def _admit(self, admit: RowAdmit) -> None:
        assert 0 <= admit.row < self.max_rows, f"row {admit.row} does not exist"
        assert admit.row not in self.rows, f"row {admit.row} admitted but in use"
        size = self.page_size
        assert admit.num_cached_tokens % size == 0, "only full pages are cached"
        slots = [s for p in admit.pages[: admit.num_cached_tokens // size] for s in self.memory[p]]
        salt = self.salt_of(admit.sampling)
        prefix_hash = salt
        for token, stored in slots:
            prefix_hash = mix(prefix_hash, token)
            assert stored == prefix_hash, "cached pages do not hold one prefix of this salt"
        counted = sum(admit.counted_ids)
        assert admit.sampling.uses_penalties or not admit.counted_ids, "counted_ids not empty"
        row = FakeRow(
            admit.sampling, list(admit.pages), slots, salt, counted, admit.num_output_tokens
        )
        if admit.grammar is not None:
            assert len(admit.output_ids) == admit.num_output_tokens, "output_ids"
            row.matched = list(admit.output_ids)
            row.fails_at = fails_at(admit.grammar)
        self.rows[admit.row] = row

    def _check_shape(self, plan: StepPlan) -> None:
        active = [chunk.row for chunk in plan.prefill] + plan.decode
        assert active, "an empty plan"
        assert len(set(active)) == len(active), "a row twice in one step"
        assert set(active) <= self.rows.keys(), "a row that was not admitted"
        assert 0 <= plan.num_drafts <= self.mtp_step, f"{plan.num_drafts} drafts"
        num_tokens = len(plan.decode) * (1 + plan.num_drafts)
        num_tokens += sum(len(chunk.token_ids) for chunk in plan.prefill)
        assert self.max_tokens is None or num_tokens <= self.max_tokens, "over the token budget"
        for chunk in plan.prefill:
            size = self.chunk_size or len(chunk.token_ids)
            assert 0 < len(chunk.token_ids) <= size, f"a chunk of {len(chunk.token_ids)} tokens"
        for row in self.rows.values():
            assert len(set(row.pages)) == len(row.pages), "a page twice in one table"
            used = (len(row.pages) - 1) * self.page_size
            assert used < self.max_row_tokens, "a page after the end of the longest request"
            assert all(0 <= page < self.num_pages for page in row.pages), "page does not exist"
        users = Counter(page for row in self.rows.values() for page in row.pages)
        counts = [(chunk.row, len(chunk.token_ids)) for chunk in plan.prefill]
        width = 1 + plan.num_drafts
        for number, count in counts + [(number, width) for number in plan.decode]:
            row = self.rows[number]
            start, end = len(row.slots), len(row.slots) + count
            capacity = len(row.pages) * self.page_size
            if self.mtp_step and number in plan.decode:  # a draft without a page is not written
                end = min(end + plan.num_drafts, capacity)  # recurrent drafts write, too
            assert end <= capacity, f"row {number} has no page to write to"
            for page in row.pages[start // self.page_size : (end - 1) // self.page_size + 1]:
                assert users[page] == 1, f"page {page} is written to but in two tables"

    def _check_memory(self, number: int) -> None:
        row = self.rows[number]
        size = self.page_size
        for index in range(-(-len(row.slots) // size)):
            expected = row.slots[index * size : (index + 1) * size]
            stored = self.memory[row.pages[index]][: len(expected)]
            assert stored == expected, (
                f"page {row.pages[index]} does not hold row {number}'s prefix"
            )

    def _run_chunk(self, chunk: PrefillChunk) -> list[TokenLogprob]:
        row = self.rows[chunk.row]
        assert chunk.start == len(row.slots), f"chunk at {chunk.start}, row has {len(row.slots)}"
        assert row.last_token is None, "a prompt chunk after sampling"
        assert row.next_id in (None, chunk.token_ids[0]), "next_id was not the next token"
        assert chunk.sample == (chunk.next_id == -1), "next_id is -1 exactly when sampling"
        row.next_id = None if chunk.sample else chunk.next_id
        self._write(row, chunk.token_ids)
        if row.sampling.num_prompt_logprobs < 0:
            return []
        end = chunk.start + len(chunk.token_ids)
        positions = range(max(1, chunk.start), end)
        return [TokenLogprob(row.slots[p][0], -float(p), 1, []) for p in positions]

    def _decode(self, number: int, num_drafts: int) -> RowResult:
        """Run the last token and the drafts, of which some are accepted."""
        row = self.rows[number]
        assert row.last_token is not None, f"row {number} decodes without a last token"
        num_free = len(row.pages) * self.page_size - len(row.slots)
        if not num_free:  # the request has all its tokens by drafts: this answer is not read
            return RowResult([-7])
        fate = mix(row.slots[-1][1], num_drafts)
        num_accepted = num_drafts if fate % 3 else fate // 3 % (1 + num_drafts)
        num_accepted = min(num_accepted, num_free - 1)
        outputs = RowResult([], [])
        for _ in range(1 + num_accepted):
            self._write(row, [row.last_token])
            result = self._sample(number)
            if result.error:  # its other tokens of this step are not sent
                outputs = result
                break
            outputs = RowResult(
                outputs.token_ids + result.token_ids, outputs.logprobs + result.logprobs
            )
        first = len(row.slots)  # from here: KV of rejected drafts, and of drafts for the next step
        last = min(first + 2 * num_drafts - num_accepted, len(row.pages) * self.page_size)
        for position in range(first, last):
            page = row.pages[position // self.page_size]
            self.memory[page][position % self.page_size] = (number, position)
        return outputs

    def _write(self, row: FakeRow, tokens: list[int]) -> None:
        size = self.page_size
        prefix_hash = row.slots[-1][1] if row.slots else row.salt
        for token in tokens:
            prefix_hash = mix(prefix_hash, token)
            position = len(row.slots)
            row.slots.append((token, prefix_hash))
            self.memory[row.pages[position // size]][position % size] = row.slots[-1]

    def _sample(self, number: int) -> RowResult:
        row = self.rows[number]
        sampling = row.sampling
        if row.num_outputs == row.fails_at:
            row.last_token = -8  # anything
            return RowResult([], error=GRAMMAR_ERROR)
        token = next_token(
            row.slots[-1][1], sampling, row.counted, row.num_outputs, self.vocab_size
        )
        if row.matched is not None:
            seen = [slot[0] for slot in row.slots[len(row.slots) - len(row.matched) :]]
            assert row.matched == seen, "the grammar saw other outputs"
            row.matched.append(token)
        row.last_token = token
        row.num_outputs += 1
        row.counted += token
        position = float(len(row.slots))
        logprobs = [TokenLogprob(token, -position, 1, [])] if sampling.num_logprobs >= 0 else []
        return RowResult([token], logprobs)


class FakeEngine:
    """A Scheduler and its FakeWorker, for tests that follow requests through steps.

    `turn()` is one step of the workers: the scheduler fills its look-ahead, then the oldest plan
    in flight is answered. Everything sent to frontends is in `tokens` and `finished`."""

    def __init__(self, num_pages: int, **config: Any) -> None:
        values: dict[str, Any] = {
            "max_req_total_len": 1 << 20,
            "page_size": 4,
            "running_max_req_size": 8,
            "batch_max_tokens": 64,
            "chunked_prefill_size": 32,
        }
        self.config = ServeConfig(**(values | config))
        self.core = Scheduler(self.config)
        self.num_pages = num_pages
        self.now_ns = 1_000_000_000
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, Finished] = {}
        self.sent: list[Outgoing] = []  # everything, in order
        self.plans: list[StepPlan] = []  # every one, in order
        self.in_flight: list[StepPlan] = []
        self._next_id = 1
        self.start_workers(0)

    def start_workers(self, epoch: int, num_pages: int | None = None) -> None:
        """A new worker group says that it is ready."""
        config = self.config
        self.worker = FakeWorker(
            num_pages or self.num_pages,
            config.page_size,
            config.running_max_req_size or 0,
            epoch,
            max_tokens=config.batch_max_tokens,
            chunk_size=None if config.disable_chunked_prefill else config.chunked_prefill_size,
            mtp_step=config.mtp_step,
            max_row_tokens=config.max_req_total_len or 1 << 30,
        )
        self.in_flight = []
        self.tell(
            *(Ready("worker", rank, epoch, self.worker.num_pages) for rank in range(config.tp))
        )

    def tell(self, *messages: Message) -> None:
        """Messages arrive at the scheduler; what it plans goes to the worker's queue."""
        inbox: list[Any] = list(messages)
        while True:
            plan, outbox = self.core.step(self.now_ns, inbox)
            inbox = []
            for outgoing in outbox:
                self._note(outgoing)
            self.core.check_integrity()
            if plan is None:
                return
            self.plans.append(plan)
            self.in_flight.append(plan)

    def _note(self, outgoing: Outgoing) -> None:
        self.sent.append(outgoing)
        match outgoing.message:
            case Tokens(rows=rows):
                for row in rows:
                    assert row.request_id not in self.finished, "tokens after Finished"
                    self.tokens.setdefault(row.request_id, []).extend(row.token_ids)
            case Finished() as finished:
                assert finished.request_id not in self.finished, "Finished twice"
                self.finished[finished.request_id] = finished

    def submission(
        self, prompt: list[int], max_new_tokens: int = 4, *, frontend: int = 0, **values: Any
    ) -> Submit:
        """A Submit with a new id; `values` are fields of Submit or of SamplingParams."""
        fields = {k: values.pop(k) for k in list(values) if k in Submit.__struct_fields__}
        sampling = SamplingParams(max_new_tokens, seed=self._next_id, **values)
        submit = Submit(self._next_id, frontend, prompt, sampling, **fields)
        self._next_id += 1
        return submit

    def submit(self, prompt: list[int], max_new_tokens: int = 4, **values: Any) -> int:
        """Submit a request and return its id."""
        submit = self.submission(prompt, max_new_tokens, **values)
        self.tell(submit)
        return submit.request_id

    def turn(self, count: int = 1) -> None:
        """The workers answer the oldest plan, `count` times; 10 ms each."""
        for _ in range(count):
            self.now_ns += 10_000_000
            if self.in_flight:
                self.tell(self.worker.run(self.in_flight.pop(0)))
            else:
                self.tell()

    def finish(self, max_turns: int = 2000) -> None:
        """Turn until no request is live."""
        for _ in range(max_turns):
            if not self.core.num_live:
                return
            self.turn()
        raise AssertionError(f"{self.core.num_live} requests live after {max_turns} steps")

    def right_answer(self, submit: Submit) -> list[int]:
        """The outputs that the request must get."""
        limit = self.core.heartbeat().pages_total * self.config.page_size - self.config.page_size
        limit = min(limit, self.config.max_req_total_len or limit)
        vocab_size = self.worker.vocab_size
        return oracle(submit.prompt_ids, submit.sampling, limit, vocab_size, 0, submit.grammar)[0]
