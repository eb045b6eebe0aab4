"""Faults made by hand, each a small change to the production code. They prove that the simulation
finds faults: each one must be noticed within a few seeds."""

import copy
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from glimmer.scheduler import (
    admission,
    batch,
    core,
    memory,
    radix,
    request,
    worker_group,
)
from glimmer.scheduler.request import RequestState
from glimmer.shared import messages

Patch = Callable[[Any, str, Any], None]
Mutant = Callable[[Patch], None]


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> Mutant:
    """The mutant that puts `make(original)` in place of `owner.name`."""
    return lambda patch: patch(owner, name, make(owner.__dict__[name]))


def _skip_a_decref(drop: Any) -> Any:
    return lambda self, numbers: drop(
        self, list(numbers)[1:] if len(list(numbers)) > 2 else numbers
    )


def _free_twice(release: Any) -> Any:
    def mutant(self: Any, table: Any) -> None:
        last = table.pages[-1:]
        release(self, table)
        if last and self.pool._holders[last[0]] == 0:
            self.pool._free.append(last[0])

    return mutant


def _forget_abort_in_queue(remove: Any) -> Any:
    def mutant(self: Any, req: Any) -> None:
        if (
            req.state is RequestState.WAITING
            and req.queue_ns < 0
            and req.table.waits_for is not None
        ):
            return  # left in the queue
        remove(self, req)

    return mutant


def _drop_token_when_paused(add_tokens: Any) -> Any:
    def mutant(self: Any, step: Any, rows: Any, mem: Any) -> None:
        is_paused = any(req.state is RequestState.PAUSED for req in step.sampling)
        outcome = batch.Outcome() if is_paused else self  # the tokens are known, but never sent
        add_tokens(outcome, step, rows, mem)
        self.accepted = outcome.accepted

    return mutant


def _apply_extra_step(add_tokens: Any) -> Any:
    def mutant(self: Any, step: Any, rows: Any, mem: Any) -> None:
        ghosts = [copy.copy(r) for r in step.sampling if r.state is RequestState.FINISHED]
        for req in ghosts:
            req.state = RequestState.LAST
        by_id = {r.request_id: r for r in ghosts}
        revived = [by_id.get(r.request_id, r) for r in step.sampling]
        add_tokens(self, step._replace(sampling=revived), rows, mem)
        self.ended = [(r, why) for r, why in self.ended if r not in ghosts]

    return mutant


def _keep_what_follows_the_end(add_tokens: Any) -> Any:
    def mutant(self: Any, step: Any, rows: Any, mem: Any) -> None:
        add_tokens(self, step, rows, mem)
        ended = {r.request_id for r, _ in self.ended}
        sent = {r.request_id: row for r, row in zip(step.sampling, rows, strict=True)}
        for part in self.rows.values():
            for index, row in enumerate(part):
                if row.request_id in ended:
                    whole = sent[row.request_id].token_ids
                    part[index] = msgspec.structs.replace(row, token_ids=whole)

    return mutant


def _count_dropped_drafts(add_tokens: Any) -> Any:
    def mutant(self: Any, step: Any, rows: Any, mem: Any) -> None:
        before = [r.num_accepted for r in step.sampling]
        add_tokens(self, step, rows, mem)
        for req, row, old in zip(step.sampling, rows, before, strict=True):
            if req.num_accepted != old:
                req.num_accepted = old + len(row.token_ids) - 1

    return mutant


def _believe_in_drafts(receive: Any) -> Any:
    def mutant(self: Any, num_tokens: int, width: int) -> None:
        num_kv = self.table.num_kv
        receive(self, num_tokens, width)
        self.table.num_kv = num_kv

    return mutant


def _one_token_per_step(receive: Any) -> Any:
    def mutant(self: Any, num_tokens: int, width: int) -> None:
        min_planned = self.min_planned
        receive(self, num_tokens, width)
        self.min_planned = min_planned

    return mutant


def _pages_beyond_the_end(append_pages: Any) -> Any:
    def mutant(self: Any, req: Any, num_kv: int) -> None:
        longest, req.max_total_tokens = req.max_total_tokens, 1 << 30
        append_pages(self, req, num_kv)
        req.max_total_tokens = longest

    return mutant


def _free_drafts(add_chunk: Any) -> Any:
    def mutant(self: Any, req: Any) -> None:
        if not self.__dict__.get("freed"):  # the first chunk: only decode rows were counted so far
            self.freed = True
            self.budget += len(self._plan.decode) * self._num_drafts
        add_chunk(self, req)

    return mutant


def _stale_bound(lose_planned: Any) -> Any:
    def mutant(self: Any) -> None:
        self.min_planned = len(self.tokens)

    return mutant


def _no_cap(find: Any) -> Any:
    def mutant(self: Any, table: Any) -> Any:
        nodes, needed = find(self, table)
        num_pages = len(table.tokens) // self.page_size
        full = self.cache.match(table.salt or "", table.tokens, num_pages)
        uses_cache = table.salt is not None
        if uses_cache and not table.waits_for_prefix and len(full) > len(nodes):
            return full, needed
        return nodes, needed

    return mutant


def _publish_without_kv(publish: Any) -> Any:
    def mutant(self: Any, table: Any) -> None:
        num_kv, table.num_kv = table.num_kv, min(len(table.tokens), table.capacity)
        publish(self, table)
        table.num_kv = num_kv

    return mutant


def _publish_at_once(start: Any) -> Any:
    def mutant(self: Any, table: Any, nodes: Any) -> None:
        start(self, table, nodes)
        for node in table.pending:
            node.ready = True
        table.pending = []

    return mutant


def _evict_in_use(take: Any) -> Any:
    def mutant(self: Any, count: int) -> Any:
        while self.pool.num_free < count:
            node = [n for n in self.cache.nodes() if not n.children][-1]
            self.pool.drop((node.page,))
            del node.parent.children[node.key]
            self.cache.num_nodes -= 1
            self.cache.num_evictable -= node.locks == 0
        return take(self, count)

    return mutant


def _keep_cache_over_epochs(forget: Any) -> Any:
    def mutant(self: Any) -> None:
        old = self.__dict__.get("memory")
        if old is not None and old.num_pages:
            self.kept = old
        forget(self)

    return mutant


def _enroll_with_kept_cache(enroll: Any) -> Any:
    def mutant(self: Any, ready: Any) -> bool:
        complete = enroll(self, ready)
        kept = self.__dict__.get("kept")
        if complete and kept is not None and kept.num_pages == self.memory.num_pages:
            self.memory = kept
        return bool(complete)

    return mutant


def _lose_a_token(requeue: Any) -> Any:
    def mutant(requests: Any, waiting: Any) -> Any:
        lost = requeue(requests, waiting)
        for req in lost:
            del req.tokens[max(req.num_prompt_tokens, len(req.tokens) - 1) :]
            req.lose_planned()
        return lost

    return mutant


def _resumed_from_zero(admit: Any) -> Any:
    def mutant(self: Any, req: Any) -> None:
        admit(self, req)
        admitted = self._plan.admitted
        admitted[-1] = msgspec.structs.replace(admitted[-1], num_output_tokens=0)

    return mutant


def _leak_row(release_row: Any) -> Any:
    def mutant(self: Any, req: Any) -> None:
        aborted_in_prefill = req.state is RequestState.PREFILL
        release_row(self, req)
        if aborted_in_prefill:
            self.free_rows.pop()

    return mutant


def _send_logprobs_again(release_row: Any) -> Any:
    def mutant(self: Any, req: Any) -> None:
        release_row(self, req)
        req.num_logprob_positions = 1

    return mutant


def _steal_before(choose_victim: Any) -> Any:
    return lambda running: running[0]


def _free_budget(add_chunk: Any) -> Any:
    def mutant(self: Any, req: Any) -> None:
        budget = self.budget
        add_chunk(self, req)
        self.budget = budget - 1

    return mutant


def _accept_old_epoch(on_result: Any) -> Any:
    def mutant(self: Any, result: Any) -> None:
        on_result(self, msgspec.structs.replace(result, epoch=self.workers.epoch))

    return mutant


def _never_expire(expired: Any) -> Any:
    return lambda self, now_ns: []


def _errors_are_nothing(add_tokens: Any) -> Any:
    def mutant(self: Any, step: Any, rows: Any, mem: Any) -> None:
        add_tokens(self, step, rows, mem)
        self.ended = [(r, why) for r, why in self.ended if why.reason != "invalid"]

    return mutant


def _errors_end_the_step(add_tokens: Any) -> Any:
    def mutant(self: Any, step: Any, rows: Any, mem: Any) -> None:
        add_tokens(self, step, rows, mem)
        errors = [why for _, why in self.ended if why.reason == "invalid"]
        ended = [r for r, _ in self.ended]
        self.ended += [(r, errors[0]) for r in step.live_requests() if errors and r not in ended]

    return mutant


def _errors_keep_a_page(finish: Any) -> Any:
    def mutant(self: Any, req: Any, ending: Any, tell: bool = True) -> None:
        if ending.reason == "invalid":
            self.workers.memory.pool.hold(req.table.pages[-1:])
        finish(self, req, ending, tell)

    return mutant


MUTANTS: dict[str, Mutant] = {
    "skips a reference when dropping pages": replace(radix.PagePool, "drop", _skip_a_decref),
    "frees a page twice": replace(memory.Memory, "release", _free_twice),
    "forgets an abort in the waiting queue": replace(
        admission.WaitingQueue, "remove", _forget_abort_in_queue
    ),
    "accepts results of an old epoch": replace(core.Scheduler, "_on_result", _accept_old_epoch),
    "drops the token in flight at preemption": replace(
        batch.Outcome, "add_tokens", _drop_token_when_paused
    ),
    "sends the token of the extra step": replace(batch.Outcome, "add_tokens", _apply_extra_step),
    "takes the last prompt token from the cache": replace(memory.Memory, "find", _no_cap),
    "caches a page whose KV is not planned": replace(memory.Memory, "publish", _publish_without_kv),
    "shares pages that are not written yet": replace(memory.Memory, "start", _publish_at_once),
    "evicts pages in use": replace(memory.Memory, "_take", _evict_in_use),
    "loses a token when workers die": replace(core, "requeue", _lose_a_token),
    "resumes with a wrong output count": replace(batch.StepBuilder, "admit", _resumed_from_zero),
    "leaks the row of an abort in prefill": replace(
        worker_group.WorkerGroup, "release_row", _leak_row
    ),
    "preempts the oldest": replace(core, "choose_victim", _steal_before),
    "does not count chunks in the budget": replace(batch.StepBuilder, "add_chunk", _free_budget),
    "never ends a wait in the queue": replace(admission.WaitingQueue, "expired", _never_expire),
    "shares prefixes between salts": replace(
        radix.PrefixCache,
        "match",
        lambda match: (
            lambda self, salt, tokens, n: max(
                (match(self, s, tokens, n) for s in ("", "other")), key=len
            )
        ),
    ),
    "waits for a prefix that no request computes any more": replace(
        radix.Node, "is_coming", lambda _: property(lambda self: not self.ready)
    ),
    "resumes a row without what its grammar has seen": replace(
        request.Request, "output_ids", lambda _: lambda self: []
    ),
    "ignores the error of a grammar": replace(batch.Outcome, "add_tokens", _errors_are_nothing),
    "ends all requests of a step with one whose grammar failed": replace(
        batch.Outcome, "add_tokens", _errors_end_the_step
    ),
    "keeps a page of a request whose grammar failed": replace(
        core.Scheduler, "_finish", _errors_keep_a_page
    ),
    "counts prompt tokens as outputs for penalties": replace(
        request.Request,
        "counted_ids",
        lambda _: lambda self: list(self.tokens) if self.sampling.uses_penalties else [],
    ),
    "sends prompt logprobs again after a resume": replace(
        worker_group.WorkerGroup, "release_row", _send_logprobs_again
    ),
}


def _fail_without_flush(on_failed_step: Any) -> Any:
    def mutant(self: Any, step: Any, error: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory.Memory, "flush", lambda self: None)
            on_failed_step(self, step, error)

    return mutant


def _fail_without_requeue(on_failed_step: Any) -> Any:
    def mutant(self: Any, step: Any, error: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core, "requeue", lambda *_: [])
            on_failed_step(self, step, error)

    return mutant


def _ignore_flushes(handle: Any) -> Any:
    def mutant(self: Any, message: Any) -> None:
        if not isinstance(message, messages.FlushCache):
            handle(self, message)

    return mutant


def _flush_pages_in_use(flush: Any) -> Any:
    def mutant(self: Any) -> None:
        flush(self)
        for node in [node for node in self.cache.nodes() if not node.children][:1]:
            self.pool.drop((node.page,))

    return mutant


def _keep_cache(patch: Patch) -> None:
    replace(worker_group.WorkerGroup, "forget", _keep_cache_over_epochs)(patch)
    replace(worker_group.WorkerGroup, "enroll", _enroll_with_kept_cache)(patch)


MUTANTS |= {
    "sends what follows a stop token in its step": replace(
        batch.Outcome, "add_tokens", _keep_what_follows_the_end
    ),
    "counts dropped drafts as accepted": replace(
        batch.Outcome, "add_tokens", _count_dropped_drafts
    ),
    "believes that rejected drafts have KV": replace(
        request.Request, "receive", _believe_in_drafts
    ),
    "counts one token for each step": replace(request.Request, "receive", _one_token_per_step),
    "allocates pages beyond the longest length for drafts": replace(
        batch.StepBuilder, "_append_pages", _pages_beyond_the_end
    ),
    "does not count drafts in the budget": replace(batch.StepBuilder, "add_chunk", _free_drafts),
    "remembers drafts in flight when workers die": replace(
        request.Request, "lose_planned", _stale_bound
    ),
}
MUTANTS["keeps the prefix cache over epochs"] = _keep_cache
MUTANTS |= {
    "keeps cached pages that a failed step should have written": replace(
        core.Scheduler, "_on_failed_step", _fail_without_flush
    ),
    "does not flush the cache when it is asked to": replace(
        core.Scheduler, "_handle", _ignore_flushes
    ),
    "flushes cached pages that are in use": replace(memory.Memory, "flush", _flush_pages_in_use),
    "reads the result of a plan that builds on a failed step": replace(
        worker_group.WorkerGroup, "void_plans", lambda _: lambda self: None
    ),
    "goes on with rows that were admitted beside a failed step": replace(
        core.Scheduler, "_on_failed_step", _fail_without_requeue
    ),
}
