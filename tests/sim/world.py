"""A whole server in one thread with a virtual clock: the production Scheduler, virtual workers,
frontends, clients and launcher, and faults. One seed decides everything, so one seed replays a bug.

`run(seed)` returns the world at rest, or raises `Violation` naming the seed. Arrivals,
aborts and faults end at a time; then everything must come to rest (no starvation, no leak).
"""

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fakes import GRAMMAR_ERROR, FakeWorker, fails_at, grammar, oracle
from glimmer.scheduler.core import Outgoing, Scheduler
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import (
    Abort,
    Finished,
    FlushCache,
    Grammar,
    Hello,
    Message,
    PeerLost,
    Ready,
    RowResult,
    Shutdown,
    StepPlan,
    StepResult,
    Submit,
    TokenRow,
    Tokens,
    WorkerFailed,
)
from glimmer.shared.sampling import SamplingParams
from glimmer.shared.transport import encode
from limits import Limits, Violation, expect

MS = 1_000_000
VOCAB = 24
STEP_TIMEOUT_S = 2.0


@dataclass
class Knobs:
    """The configuration and the kinds of events of one seed."""

    config: ServeConfig
    num_pages: int
    num_requests: int
    shrinks: bool  # a restarted worker group may have fewer pages
    kills: int
    hangs: int
    bad_results: int
    failed_steps: int
    frontend_losses: int
    drain_s: float | None
    abort_share: float
    active_ms: int  # arrivals and faults happen within this time
    outgrows: bool  # short prompts, long outputs, few pages: expect preemptions
    crowds: bool  # many samples of one long prompt in small chunks: expect waits for prefixes
    contended: bool = False  # users with many requests each, few rows, enough pages
    besieged: bool = False  # one long prompt among many short ones, which leave it no room

    @classmethod
    def draw(cls, rng: random.Random, api_key: tuple[str, ...]) -> "Knobs":
        page_size = rng.choice((1, 2, 4, 16))
        limit = rng.choice((24, 40, 64))
        least = -(-limit // page_size) + 1
        num_pages = rng.choice((least, least + 2, 2 * least, 6 * least))
        batch = rng.choice((6, 16, 48, 128))
        no_chunks = rng.random() < 0.15
        faulty = rng.random() < 0.5
        outgrows = rng.random() < 0.4
        crowds = not outgrows and rng.random() < 0.3
        if outgrows:
            num_pages = rng.choice((least, 2 * least))
        elif crowds:
            num_pages = 6 * least
        config = ServeConfig(
            tp=rng.choice((1, 1, 2)),
            max_req_total_len=limit,
            page_size=page_size,
            running_max_req_size=rng.choice((8, 24) if outgrows else (1, 3, 8, 24)),
            batch_max_tokens=max(batch, limit) if no_chunks else batch,
            chunked_prefill_size=rng.choice((1, 5) if crowds else (1, 5, batch)),
            disable_chunked_prefill=no_chunks,
            disable_dynamic_prompt_cache=rng.random() < 0.15,
            max_queued_requests=rng.choice((4, 4096, 4096)),
            max_queued_tokens=rng.choice((60, 1 << 30, 1 << 30)),
            queue_timeout_s=rng.choice((0.0, 0.05, 600.0, 600.0)),
            httpserver_workers=rng.choice((1, 2)),
            step_timeout_s=STEP_TIMEOUT_S,
            mtp_step=rng.choice((0, 0, 1, 2, 4, 7)),
            mtp_fixed_step=rng.random() < 0.3,
            api_key=api_key,
        )
        return cls(
            config=config,
            num_pages=num_pages,
            num_requests=rng.choice((3, 12, 24, 40)),
            shrinks=faulty and rng.random() < 0.2,
            kills=rng.randrange(4) if faulty else 0,
            hangs=faulty and rng.random() < 0.2,
            bad_results=faulty and rng.random() < 0.2,
            failed_steps=rng.choice((1, 3, 20)) if faulty and rng.random() < 0.3 else 0,
            frontend_losses=rng.randrange(3) if faulty else 0,
            drain_s=rng.choice((0.0, 0.05, 5.0)) if rng.random() < 0.15 else None,
            abort_share=0.8 if crowds else rng.choice((0.0, 0.2, 0.8)),
            active_ms=1000 if crowds else rng.choice((20, 200, 600)),
            outgrows=outgrows,
            crowds=crowds,
        )

    def contend(self, rng: random.Random) -> "Knobs":
        """These, with users who all want more than their shares."""
        rows, config = rng.choice((1, 1, 3)), self.config
        least = -(-(config.max_req_total_len or 0) // config.page_size) + 1
        config = replace(
            config,
            running_max_req_size=rows,
            batch_max_tokens=max(16, config.batch_max_tokens or 0),
            disable_chunked_prefill=False,
            disable_dynamic_prompt_cache=True,
            max_queued_requests=rng.choice((12, 4096, 4096)),
            max_queued_tokens=rng.choice((200, 1 << 30, 1 << 30)),
            queue_timeout_s=600.0,
        )
        return replace(
            self,
            config=config,
            contended=True,
            num_pages=rows * least + 1,
            num_requests=50,
            active_ms=rng.choice((60, 120)),
            shrinks=False,
            drain_s=None,
            outgrows=False,
            crowds=False,
        )

    def besiege(self, rng: random.Random) -> "Knobs":
        """These, with a long request that does not fit while short ones keep coming."""
        config = self.config
        least = -(-(config.max_req_total_len or 0) // config.page_size) + 1
        config = replace(
            config,
            running_max_req_size=8,
            disable_dynamic_prompt_cache=rng.random() < 0.5,
            max_queued_requests=4096,
            max_queued_tokens=1 << 30,
            queue_timeout_s=600.0,
        )
        return replace(
            self,
            config=config,
            besieged=True,
            num_pages=least + 2,
            num_requests=90,
            active_ms=150,
            kills=0,
            hangs=0,
            shrinks=False,
            bad_results=0,
            failed_steps=0,
            frontend_losses=0,
            drain_s=None,
            abort_share=0.0,
            outgrows=False,
            crowds=False,
        )


@dataclass
class Client:
    """What a frontend knows of one request."""

    submit: Submit
    salt: int
    incarnation: int
    abort_after: int | None  # abort when so many tokens have arrived
    tokens: list[int] = field(default_factory=list)
    num_accepted: int = 0  # of these, drafts
    prompt_logprobs: list[int] = field(default_factory=list)
    aborted: bool = False
    delivered: bool = False  # the scheduler has seen the Submit
    finished: Finished | None = None
    was_hit: bool = False  # a step failed that ran it
    muted: bool = False  # the scheduler knows that the frontend is gone


class Group:
    """One worker epoch: plans queue up, run one after the other, results travel back."""

    def __init__(self, world: "SimWorld", epoch: int, num_pages: int) -> None:
        config = world.knobs.config
        self.world = world
        self.epoch = epoch
        self.alive = True
        self.hung = False
        self.slow = 1
        self.queue: list[tuple[StepPlan, int]] = []  # and the last failed step heard of before
        self.failed_step = self.heard_step = -1
        self.in_flight = 0  # plans sent whose result has not reached the scheduler
        self.last_arrival_ns = 0
        self.worker = FakeWorker(
            num_pages,
            config.page_size,
            config.running_max_req_size or 0,
            epoch,
            VOCAB,
            config.batch_max_tokens,
            None if config.disable_chunked_prefill else config.chunked_prefill_size,
            lambda sampling: world.salts[sampling.seed],
            config.mtp_step,
            config.max_req_total_len or 0,
        )

    def take(self, plan: StepPlan) -> None:
        self.in_flight += 1
        expect(self.in_flight <= 2, "more than two plans in flight")
        self.queue.append((plan, self.heard_step))
        if len(self.queue) == 1:
            self._work()

    def _work(self) -> None:
        self.world.after(self.world.rng.randint(1, 10 * self.slow) * MS // 4, self._done)

    def _done(self) -> None:
        if not self.alive or self.hung:
            return
        world = self.world
        result = self._run(*self.queue.pop(0))
        if world.bad_results and not result.error and world.rng.random() < 0.05:
            world.bad_results -= 1
            world.forgive_failure = True
            result = StepResult(result.epoch, result.step, [*result.rows, RowResult([1])])
        delay = world.rng.choice((0, 1, 3)) * MS // 4
        if world.rng.random() < 0.02:
            delay = 150 * MS  # may outlive the group
        self.last_arrival_ns = max(self.last_arrival_ns, world.now_ns + delay)
        world.at(self.last_arrival_ns, self._arrive, result)
        if self.queue:
            self._work()

    def _run(self, plan: StepPlan, heard_step: int) -> StepResult:
        """Some steps fail. Plans that were sent before the scheduler knew build on missing KV."""
        world = self.world
        if heard_step < self.failed_step:
            result = self.worker.fail(plan)
            rows = [RowResult([-7])] * (len(plan.decode) + sum(c.sample for c in plan.prefill))
            noise = StepResult(plan.epoch, plan.step, rows)
            return world.rng.choice((result, noise))
        if not world.failed_steps or world.rng.random() > 0.1:
            return self.worker.run(plan)
        world.failed_steps -= 1
        world.num_failed += 1
        self.failed_step = plan.step
        result = self.worker.fail(plan)
        active = {c.row for c in plan.prefill} | set(plan.decode)
        hit = [world.clients[self.worker.rows[row].sampling.seed] for row in active]
        world.hit_by[plan.epoch, plan.step] = hit
        for client in hit:
            client.was_hit = True
        return result

    def _arrive(self, result: StepResult) -> None:
        self.in_flight -= 1
        self.world.to_scheduler(result)


class SimWorld:
    """Everything around one Scheduler."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.grammar_rng = random.Random(~seed)
        self.flush_rng = random.Random(seed + (1 << 32))
        self.tenant_rng = random.Random(seed + (2 << 32))
        self.tenants = self.tenant_rng.choice(("", "", "a", "abc"))
        scenes = random.Random(seed + (3 << 32))
        scene = scenes.randrange(8)
        if scene == 0:
            self.tenants = "abc"
        self.knobs = Knobs.draw(self.rng, ("0" * 64,) * bool(self.tenants))
        if scene == 0:
            self.knobs = self.knobs.contend(scenes)
        elif scene == 1:
            self.knobs = self.knobs.besiege(scenes)
        while scene == 2 and not self.knobs.crowds:
            self.knobs = Knobs.draw(self.rng, self.knobs.config.api_key)
        self.core = Scheduler(self.knobs.config)
        self.checks = Limits(self.knobs.config, self.knobs.contended)
        self.now_ns = 1_000 * MS
        self.end_active_ns = self.now_ns + self.knobs.active_ms * MS
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._log = hashlib.blake2b(digest_size=16)
        self._inbox: list[Message] = []
        self._turn_scheduled = False
        self.num_events = 0
        self.num_live = 0  # requests that the scheduler must know
        self.num_preemptions = 0
        self.num_accepted = 0  # drafts
        self.log_hash = ""  # set at the end

        self.clients: dict[int, Client] = {}
        self._answers: dict[tuple[int, int], tuple[list[int], str]] = {}  # by request id, limit
        self.salts: dict[int, int] = {}  # by sampling seed
        self.incarnations = [0] * self.knobs.config.httpserver_workers
        self.frontend_up_ns = [0] * len(self.incarnations)  # since when each is up again
        self.limits: list[int] = []
        self.group: Group | None = None
        self.epoch = 0
        self.losses = 0
        self.bad_results = int(self.knobs.bad_results)
        self.failed_steps = self.knobs.failed_steps
        self.num_failed = 0
        self.num_grammar_errors = 0
        self.hit_by: dict[tuple[int, int], list[Client]] = {}  # (epoch, step) that failed
        self.forgive_failure = False
        self.told_losses = [0] * len(self.incarnations)  # PeerLost delivered, by frontend
        self.draining_ns: int | None = None
        self.launcher_link_ns = 0  # when its last message arrives

    # --- time ------------------------------------------------------------------------------

    def at(self, time_ns: int, call: Callable[..., None], *args: Any) -> None:
        self._order += 1
        heapq.heappush(self._events, (time_ns, self._order, call, args))

    def after(self, delay_ns: int, call: Callable[..., None], *args: Any) -> None:
        self.at(self.now_ns + delay_ns, call, *args)

    def run(self) -> None:
        """Run until everything is at rest."""
        self._schedule_history()
        while self._events:
            self.num_events += 1
            expect(self.num_events < 60_000, "the system does not come to rest")
            self.now_ns, _, call, args = heapq.heappop(self._events)
            call(*args)
        self._check_rest()
        self.log_hash = self._log.hexdigest()

    def _schedule_history(self) -> None:
        rng, knobs = self.rng, self.knobs
        for index in range(knobs.config.httpserver_workers):
            self.to_scheduler(Hello("frontend", index, 1000 * index, "hash"))
        self._start_group(0)
        prefixes = [[rng.randrange(VOCAB) for _ in range(60)] for _ in range(3)]
        if knobs.besieged:
            limit = knobs.config.max_req_total_len or 0
            self._schedule_client(self.now_ns + 5 * MS, [1] * (limit - 1), 0)
        for _ in range(knobs.num_requests):
            if knobs.contended or knobs.besieged:
                prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 4))]
                self._schedule_client(self._active_time(), prompt, 0)
            else:
                self._schedule_arrivals(prefixes)
        for _ in range(knobs.kills):
            self.at(self._active_time(), self._kill_group, "killed")
        for _ in range(int(knobs.hangs)):
            self.at(self._active_time(), self._hang)
        if rng.random() < 0.2:
            self.at(self._active_time(), self._slow_down)
        for _ in range(knobs.frontend_losses):
            self.at(self._active_time(), self._lose_frontend)
        if knobs.drain_s is not None:
            self.at(self._active_time(), self._drain)
        for _ in range(self.flush_rng.choice((0, 0, 1, 2, 4))):
            time_ns = self.flush_rng.randrange(self.now_ns, self.end_active_ns)
            self.at(time_ns, self.to_scheduler, FlushCache())
        # Time-outs need a step now and then, as the loop makes for its heartbeat.
        for tick in range(40):
            self.after(tick * 250 * MS, self._wake)

    def _active_time(self) -> int:
        return self.rng.randrange(self.now_ns, self.end_active_ns)

    # --- the scheduler process -----------------------------------------------------------------

    def to_scheduler(self, message: Message) -> None:
        """`message` has arrived in the scheduler's inbox."""
        self._log.update(b"<%d" % self.now_ns + encode(message))
        self._inbox.append(message)
        self._wake()

    def _wake(self) -> None:
        if not self._turn_scheduled:
            self._turn_scheduled = True
            self.after(self.rng.choice((0, 0, MS // 10, MS)), self._turn)

    def _turn(self) -> None:
        self._turn_scheduled = False
        inbox, self._inbox = self._inbox, []
        for message in inbox:
            if isinstance(message, Submit):
                self.clients[message.request_id].delivered = True
                self.num_live += 1
        while True:
            plan, outbox = self._step(inbox)
            for outgoing in outbox:
                self._log.update(b">%d" % self.now_ns + encode(outgoing.message))
                if outgoing.to == "launcher":
                    self._launcher_hears(outgoing.message)
                else:
                    self._frontend_hears(outgoing.index, outgoing.message)
            for message in inbox:
                self._note_loss(message)
                self._note_failure(message)
            if inbox:
                self._check_count()
            if plan is None:
                return
            self._log.update(b"!" + encode(plan))
            if self.group is not None and self.group.epoch == plan.epoch:
                self.group.take(plan)
            inbox = []

    def _step(self, inbox: list[Message]) -> tuple[StepPlan | None, list[Outgoing]]:
        """One step of the core. Its invariants do not hold for KV that is lost in it."""
        core, memory = self.core, self.core.workers.memory
        unused = []
        if any(isinstance(message, FlushCache) for message in inbox):
            unused = [node for node in memory.cache.nodes() if not node.locks]
        plan, outbox = core.step(self.now_ns, inbox)  # type: ignore[arg-type]
        if plan is None and not inbox and not outbox:
            return plan, outbox
        failed = any(isinstance(message, StepResult) and message.error for message in inbox)
        is_lost = failed or memory is not core.workers.memory
        # A result before the flush may put a request on a page that was unused.
        is_flushed = all(node.parent is None or node.locks for node in unused)
        expect(is_lost or is_flushed, "a flush kept an unused page")
        live = core.check_integrity()
        self.checks.after(inbox, plan, outbox, live, is_lost, core.workers.memory)
        return plan, outbox

    def _note_loss(self, message: Message) -> None:
        match message:
            case Hello(role="frontend"):
                self._mute(message.index, message.pid % 1000)
            case PeerLost(role="frontend"):
                self.told_losses[message.index] += 1
                self._mute(message.index, self.told_losses[message.index])

    def _note_failure(self, message: Message) -> None:
        if not isinstance(message, StepResult) or not message.error:
            return
        group = self.group  # a dead one's results are ignored
        if group is not None and group.alive and group.epoch == message.epoch:
            group.heard_step = max(group.heard_step, message.step)
            for client in self.hit_by.get((message.epoch, message.step), []):
                ended = client.finished is not None or client.muted
                expect(ended, "a request goes on after its step failed")

    def _mute(self, index: int, incarnation: int) -> None:
        """The scheduler knows that frontend `index` is in this incarnation now."""
        for client in self.clients.values():
            if client.submit.frontend == index and client.incarnation < incarnation:
                self.num_live -= client.delivered and not client.muted and client.finished is None
                client.muted |= client.delivered

    def _check_count(self) -> None:
        live = self.num_live
        expect(self.core.num_live == live, f"{self.core.num_live} requests live, {live} expected")

    # --- the launcher --------------------------------------------------------------------------

    def launcher_says(self, message: Message, delay_ns: int) -> None:
        """Send to the scheduler, in order with earlier messages of the launcher."""
        self.launcher_link_ns = max(self.launcher_link_ns, self.now_ns + delay_ns)
        self.at(self.launcher_link_ns, self.to_scheduler, message)

    def _launcher_hears(self, message: Message) -> None:
        match message:
            case WorkerFailed(epoch=epoch):
                expect(self.forgive_failure, f"workers accused without cause: {message.reason}")
                if epoch == self.epoch:
                    self._kill_group("failed")
            case Ready(role="scheduler"):
                self.limits.append(message.max_req_total_len)
            case _:
                raise Violation(f"the launcher got {message}")

    def _start_group(self, epoch: int) -> None:
        num_pages = self.knobs.num_pages
        if epoch and self.knobs.shrinks:
            num_pages = max(3, num_pages // 2)
        self.group = Group(self, epoch, num_pages)
        for rank in range(self.knobs.config.tp):
            pages = num_pages + (3 if rank else 0)
            ready = Ready("worker", rank, epoch, pages)
            self.after(self.rng.randrange(20) * MS, self._rank_ready, ready)

    def _rank_ready(self, ready: Ready) -> None:
        if self.group is not None and self.group.epoch == ready.epoch and self.group.alive:
            self.to_scheduler(ready)

    def _kill_group(self, reason: str) -> None:
        group = self.group
        if group is None or not group.alive:
            return
        group.alive = False
        self.losses += 1
        self.epoch += 1
        lost = PeerLost("worker", 0, reason, group.epoch)
        self.launcher_says(lost, self.rng.randrange(5) * MS)
        if self.rng.random() < 0.3:  # reported for another rank too, perhaps late
            self.launcher_says(lost, self.rng.randrange(60) * MS)
        # The next group may be heard of before the loss: other socket.
        self.after(self.rng.randrange(40) * MS, self._start_group, self.epoch)

    def _hang(self) -> None:
        if self.group is not None and self.group.alive:
            self.forgive_failure = True
            self.group.hung = True

    def _slow_down(self) -> None:
        if self.group is not None:
            self.group.slow = 20

    def _drain(self) -> None:
        assert self.knobs.drain_s is not None
        self.draining_ns = self.now_ns
        self.launcher_says(Shutdown(self.knobs.drain_s), 0)
        self.after(int(self.knobs.drain_s * 1000) * MS + 2 * MS, self._wake)

    def _lose_frontend(self) -> None:
        index = self.rng.randrange(len(self.incarnations))
        if self.now_ns <= self.frontend_up_ns[index]:
            return
        self.incarnations[index] += 1
        self.frontend_up_ns[index] = self.now_ns + 3 * MS
        pid = 1000 * index + self.incarnations[index]
        self.launcher_says(PeerLost("frontend", index, "killed"), self.rng.randrange(6) * MS)
        self.after(3 * MS, self.to_scheduler, Hello("frontend", index, pid, "hash"))

    # --- clients ---------------------------------------------------------------------------------

    def _schedule_arrivals(self, prefixes: list[list[int]]) -> None:
        rng, limit = self.rng, self.knobs.config.max_req_total_len or 0
        kind = rng.random()
        if kind < 0.05:
            prompt = rng.choice(prefixes)[:limit] + [1] * rng.randrange(limit)  # too long, perhaps
        elif kind < 0.2:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 3))]
        else:
            shared = rng.choice(prefixes)[: rng.randrange(limit)]
            prompt = shared + [rng.randrange(VOCAB) for _ in range(rng.randrange(3))]
            prompt = (prompt or [0])[: limit - 1]
        if self.knobs.outgrows:
            prompt = prompt[: rng.randint(1, limit // 3)]
        salt = rng.choice((0, 0, 0, 1))
        time_ns = self._active_time()
        if self.knobs.crowds:
            prompt = [rng.randrange(VOCAB) for _ in range(limit - 2)]
        copies = rng.choice((2, 4) if self.knobs.crowds else (1, 1, 1, 3))
        for _ in range(copies):  # n samples of one prompt arrive together
            self._schedule_client(time_ns, prompt, salt)

    def _schedule_client(self, time_ns: int, prompt: list[int], salt: int) -> None:
        rng = self.rng
        request_id, outgrows = len(self.salts) + 1, self.knobs.outgrows
        sampling = SamplingParams(
            max_new_tokens=rng.choice((20, 100_000) if outgrows else (1, 2, 5, 20, 100_000)),
            min_new_tokens=rng.choice((0, 0, 3)),
            temperature=rng.choice((0.0, 1.0)),
            seed=request_id,
            stop_token_ids=rng.choice(((), (), (3,)) if outgrows else ((), (3,), (3, 5, 9))),
            presence_penalty=rng.choice((0.0, 0.0, 1.0)),
            input_penalty=rng.random() < 0.5,
            num_logprobs=rng.choice((-1, -1, 0)),
            num_prompt_logprobs=rng.choice((-1, -1, -1, -1, 0)),
        )
        tenant = self.tenant_rng.choice(self.tenants or ("",))
        priority, timeout_s = rng.choice((0, 0, 0, 1, -1)), rng.choice((0.0, 0.0, 0.0, 0.03))
        if self.knobs.contended or self.knobs.besieged:
            priority, timeout_s = 0, 0.0
            if tenant == "b":  # long prompts; the others have long outputs
                prompt = (prompt * 40)[: (self.knobs.config.max_req_total_len or 0) - 3]
            elif tenant == "c":  # comes all at once when the others have had a lot
                time_ns = max(time_ns, self.end_active_ns - self.knobs.active_ms * MS // 2)
        submit = Submit(
            request_id=request_id,
            frontend=rng.randrange(len(self.incarnations)),
            prompt_ids=prompt,
            sampling=sampling,
            use_prefix_cache=rng.random() < 0.9,
            cache_salt="other" * salt,
            priority=priority,
            timeout_s=timeout_s,
            grammar=self._maybe_grammar(),
            tenant=tenant,
        )
        abort = rng.random() < self.knobs.abort_share
        client = Client(submit, salt, 0, rng.randrange(6) if abort else None)
        self.clients[request_id] = client
        self.salts[request_id] = client.salt
        self.at(time_ns, self._submit, client)
        if abort and rng.random() < 0.6:  # at any time, also before it arrives or after its end
            latest = 15 if self.knobs.crowds else 30
            self.at(time_ns + rng.randrange(latest * MS), self._abort, client)

    def _maybe_grammar(self) -> Grammar | None:
        if self.grammar_rng.random() < 0.7:
            return None
        return grammar(self.grammar_rng.choice((-1, -1, self.grammar_rng.randrange(20))))

    def _maybe_next_turn(self, client: Client) -> None:
        """The client goes on with the conversation."""
        prompt = client.submit.prompt_ids + client.tokens
        limit = self.knobs.config.max_req_total_len or 0
        if client.tokens and len(prompt) < limit - 2 and self.rng.random() < 0.5:
            prompt = prompt + [self.rng.randrange(VOCAB) for _ in range(self.rng.randrange(2))]
            self._schedule_client(self.now_ns + self.rng.randrange(20) * MS, prompt, client.salt)

    def _submit(self, client: Client) -> None:
        index = client.submit.frontend
        if self.now_ns <= self.frontend_up_ns[index]:  # the frontend is down
            del self.clients[client.submit.request_id]
            return
        client.incarnation = self.incarnations[index]
        self.to_scheduler(client.submit)

    def _abort(self, client: Client) -> None:
        if client.incarnation < self.incarnations[client.submit.frontend]:
            return  # its frontend is gone
        client.aborted = True
        self.to_scheduler(Abort([client.submit.request_id, 10**9]))

    def _frontend_hears(self, index: int, message: Message) -> None:
        match message:
            case Ready(role="scheduler"):
                return
            case Tokens(rows=rows):
                expect(len({id(row) for row in rows}) == len(rows) > 0, "an empty Tokens")
                for row in rows:
                    client = self._client(index, row.request_id)
                    if client is not None:
                        self._client_gets(client, row)
            case Finished():
                client = self._client(index, message.request_id)
                if client is not None:
                    client.finished = message
                    self.num_live -= 1
                    self._check_finished(client, message)
                    self._maybe_next_turn(client)
            case _:
                raise Violation(f"a frontend got {message}")

    def _client(self, index: int, request_id: int) -> Client | None:
        client = self.clients[request_id]
        expect(client.submit.frontend == index, "a message for another frontend")
        expect(not client.muted, "a message for a frontend known to be gone")
        expect(client.finished is None, "a message after Finished")
        return client

    def _client_gets(self, client: Client, row: TokenRow) -> None:
        sampling, prompt = client.submit.sampling, client.submit.prompt_ids
        client.tokens += row.token_ids
        client.num_accepted += max(0, len(row.token_ids) - 1)
        right, _ = self._right_answer(client)
        expect(client.tokens == right[: len(client.tokens)], "wrong tokens")
        if sampling.num_logprobs >= 0:
            expect([e.token_id for e in row.logprobs] == row.token_ids, "logprobs of other tokens")
        for entry in row.prompt_logprobs:
            client.prompt_logprobs.append(entry.token_id)
            position = len(client.prompt_logprobs)
            expect(entry.logprob == -position, "prompt logprobs out of order")
        expect(client.prompt_logprobs == prompt[1 : len(client.prompt_logprobs) + 1], "logprobs")
        if client.abort_after is not None and len(client.tokens) > client.abort_after:
            if not client.aborted:
                self.after(self.rng.choice((0, 0, MS)), self._abort, client)
            client.aborted = True

    def _right_answer(self, client: Client) -> tuple[list[int], str]:
        limit, submit = max(self.limits, default=0), client.submit
        key = submit.request_id, limit
        if key not in self._answers:
            fields = submit.prompt_ids, submit.sampling, limit, VOCAB, client.salt, submit.grammar
            self._answers[key] = oracle(*fields)
        return self._answers[key]

    def _check_finished(self, client: Client, finished: Finished) -> None:
        submit, config = client.submit, self.knobs.config
        num_prompt, num_tokens = len(submit.prompt_ids), len(client.tokens)
        expect(finished.num_prompt_tokens == num_prompt, "num_prompt_tokens")
        expect(finished.num_output_tokens == num_tokens, "num_output_tokens")
        expect(finished.mtp_accepted_tokens == client.num_accepted, "mtp_accepted_tokens")
        expect(finished.num_cached_tokens <= max(0, num_prompt - 1), "num_cached_tokens")
        timeout_s = submit.timeout_s or config.queue_timeout_s or 1e9
        expect(0 <= finished.queue_s <= timeout_s + 0.3, f"{finished.queue_s} s in the queue")
        limits = self.limits or [config.max_req_total_len or 0]
        if finished.reason in ("stop", "length"):
            right, reason = self._right_answer(client)
            if len(set(limits)) == 1 or finished.reason == "stop":
                expect(client.tokens == right, "the stream ended too early")
                expect(finished.reason == reason, f"ended by {finished.reason}, not {reason}")
            expect(
                submit.sampling.num_prompt_logprobs < 0
                or len(client.prompt_logprobs) == num_prompt - 1,
                "prompt logprobs are missing",
            )
            if config.disable_dynamic_prompt_cache or not submit.use_prefix_cache:
                expect(finished.num_cached_tokens == 0, "cached without asking")
        elif finished.reason == "abort":
            expect(client.aborted, "aborted without asking")
        elif finished.reason == "invalid" and finished.message == GRAMMAR_ERROR:
            self.num_grammar_errors += 1
            missing = fails_at(submit.grammar) - num_tokens  # sampled in the step that failed
            expect(0 <= missing <= config.mtp_step, "the error of a grammar came too early or late")
            expect(finished.field == "guided_json", "which field is invalid")
        elif finished.reason == "invalid":
            expect(num_prompt >= min(limits), "refused but fits")
            expect(finished.field == "inputs", "which field is invalid")
        elif finished.reason == "overloaded":
            expect(num_tokens == 0 and finished.retry_after_s >= 1, "overloaded")
            bounded = config.max_queued_requests < 4096 or config.max_queued_tokens < 1 << 30
            timed = submit.timeout_s > 0 or config.queue_timeout_s == 0.05 or self.losses
            expect(bool(bounded or timed or self.draining_ns), "overloaded without cause")
        elif finished.reason == "error":
            expect(self.num_failed > 0, "an error without cause")
            expect(finished.message == "out of memory", "which error")
            expect(client.was_hit, "its step did not fail")
        elif finished.reason == "unavailable":
            expect(self.losses >= 2 or self.draining_ns is not None, "unavailable without cause")
        else:
            raise Violation(f"finished with {finished.reason}")
        if self.draining_ns is not None and self.knobs.drain_s is not None and num_tokens:
            deadline = self.draining_ns + int(self.knobs.drain_s * 1e9) + 300 * MS
            expect(self.now_ns <= deadline, "still running after the drain deadline")

    # --- at rest -----------------------------------------------------------------------------

    def _check_rest(self) -> None:
        for client in self.clients.values():
            gone = client.incarnation < self.incarnations[client.submit.frontend]
            expect(client.finished is not None or gone, "a request never finished")
        expect(self.core.num_live == 0, "a request is kept")
        beat = self.core.heartbeat()
        self.num_preemptions = beat.preemptions
        self.num_accepted = sum(beat.drafts_accepted)
        expect((beat.num_running, beat.num_waiting, beat.num_paused) == (0, 0, 0), "not idle")
        expect(beat.pages_free + beat.pages_cached == beat.pages_total, "pages are lost")


def run(seed: int) -> SimWorld:
    """Run one seed to its end. Raises Violation naming the seed and how to replay it."""
    world = SimWorld(seed)
    try:
        world.run()
    except Exception as error:
        message = f"seed {seed} at {world.now_ns / 1e9:.4f} s: {type(error).__name__}: {error}"
        replay = f"pytest tests/sim --first-seed {seed} --seeds 1"
        raise Violation(f"{message}\n  replay: {replay}\n  {world.knobs}") from error
    return world
