"""A whole server with all its processes, in one thread with a virtual clock: the production
`Supervisor`, `SchedulerLoop` and `EngineClient`, virtual workers, links, clients and faults.

`world.py` looks closely at one scheduler core. This world kills, freezes and restarts processes,
fills links, and counts restarts. `run(seed)` goes on until everything is at rest (liveness), and
`run(seed, safety=True)` ends in the middle of faults.
"""

import asyncio
import contextlib
import hashlib
import heapq
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fakes import FakeWorker, oracle
from glimmer.deploy.launcher.supervisor import Phase, Supervisor
from glimmer.frontend.engine import client as engine
from glimmer.scheduler import loop as scheduler_loop
from glimmer.scheduler import radix
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import OverloadedError, StartError
from glimmer.shared.messages import (
    Abort,
    Finished,
    Hello,
    Message,
    Progress,
    Ready,
    RowResult,
    Shutdown,
    StepPlan,
    StepResult,
)
from glimmer.shared.sampling import SamplingParams
from limits import Violation, expect
from virtual import MS, Children, Link, Process

VOCAB = 24
SECOND = 1000 * MS
REST_S = 120  # after the last fault: heartbeat limits, back-off, time limits of steps
STOPPED = -9
WORKER_FAULTS = ("step dies", "step hangs", "step fails", "step is nonsense")


class SchedulerProcess(Process):
    """The production loop around the production core."""

    def __init__(self, world: "ServerWorld", index: int, epoch: int) -> None:
        super().__init__(world, "scheduler", index, epoch)
        self.loop: scheduler_loop.SchedulerLoop | None = None
        self._inbox: list[Any] = []
        self._is_due = False
        world.after(world.load_time(), self._start)

    def _start(self) -> None:
        if not self.is_alive:
            return
        world = self.world
        child = SimpleNamespace(
            config=world.config, epoch=self.epoch, runtime_dir="sim", launcher=self.launcher
        )
        world.owner = self
        self.loop = scheduler_loop.SchedulerLoop(child)  # type: ignore[arg-type]
        self.launcher.send(Hello("scheduler", 0, self.pid, world.config_hash))
        self.bind()
        self._tick()

    def receive(self, message: Message) -> None:
        self._inbox.append(message)
        self._wake()

    def _wake(self) -> None:
        if not self._is_due:
            self._is_due = True
            self.world.after(self.world.rng.choice((0, MS // 10, MS)), self._turn)

    def _tick(self) -> None:
        if self.is_alive:
            self._wake()
            self.world.after(SECOND + MS, self._tick)

    def _turn(self) -> None:
        self._is_due = False
        if not self.is_alive or not self.reads or self.loop is None:
            return
        world, (inbox, self._inbox) = self.world, (self._inbox, [])
        world.owner = self
        for message in inbox:
            if isinstance(message, StepResult) and message.error:
                world.heard_failures[message.epoch] = message.step
        try:
            self.loop.take(inbox, 0)
        except MemoryError:  # a page allocation failed, as the seed wants it
            self.die(1)
            return
        self.loop._core.check_integrity()
        aborted = {i for m in inbox if isinstance(m, Abort) for i in m.request_ids}
        expect(aborted.isdisjoint(self.loop._core._requests), "a request outlives its abort")
        if not self.loop.is_running:
            self.die(0)

    def _thaw(self) -> None:
        super()._thaw()
        self._wake()


class WorkerProcess(Process):
    """One rank. All ranks of an epoch run a plan together; rank 0 answers."""

    def __init__(self, world: "ServerWorld", index: int, epoch: int) -> None:
        super().__init__(world, "worker", index, epoch)
        self.plans: list[StepPlan] = []
        self.hangs = False
        self.failed_at = -1
        world.after(world.load_time(), self._start)

    def _start(self) -> None:
        world, config = self.world, self.world.config
        if not self.is_alive:
            return
        if world.never_ready and self.epoch:
            self.die(4)
            return
        self.fake = FakeWorker(
            world.num_pages,
            config.page_size,
            config.running_max_req_size or 0,
            self.epoch,
            VOCAB,
            config.batch_max_tokens,
            config.chunked_prefill_size,
        )
        self.launcher.send(Hello("worker", self.index, self.pid, world.config_hash))
        self.bind()
        self.scheduler = Link(world, self, "scheduler")
        ready = Ready("worker", self.index, self.epoch, world.num_pages)
        self.scheduler.send(ready)
        self.launcher.send(ready)

    def receive(self, message: Message) -> None:
        match message:
            case StepPlan():
                self.plans.append(message)
                if self.world.rng.random() < 0.99:
                    self.world.after(self.world.rng.randint(1, 8) * MS // 4, self._run)
                else:
                    self.world.after(300 * MS, self._run)
            case Shutdown():
                self.die(0)

    def _run(self) -> None:
        """Run the next plan, if it has arrived at all ranks."""
        world = self.world
        group = [p for p in world.children.of("worker") if isinstance(p, WorkerProcess)]
        is_whole = len(group) == world.config.tp and all(p.is_alive and p.plans for p in group)
        if not is_whole or any(p.hangs or not p.reads for p in group):
            return
        first = group[0]
        plans = [p.plans.pop(0) for p in group]
        plan = plans[0]
        kind = world.step_fault()
        if kind == "step dies":
            group[-1].die(-11)
        elif kind == "step hangs":
            group[-1].hangs = True
        elif world.plan_heard[plan.epoch, plan.step] < first.failed_at:
            first.fake.fail(plan)  # it builds on a step that failed
            first._answer(self._nonsense(plan))
        elif kind == "step fails":
            first.failed_at = plan.step
            first._answer(first.fake.fail(plan))
        elif kind == "step is nonsense" or any(other != plan for other in plans):
            first._answer(self._nonsense(plan, 1))
            first.hangs = True  # what it says after it is not defined
        elif first.fake._last_step not in (None, plan.step - 1):
            first._answer(self._nonsense(plan))  # a plan before it was dropped
            first.hangs = True
        else:
            first._answer(first.fake.run(plan))

    @staticmethod
    def _nonsense(plan: StepPlan, too_many: int = 0) -> StepResult:
        count = len(plan.decode) + sum(chunk.sample for chunk in plan.prefill)
        return StepResult(plan.epoch, plan.step, [RowResult([-7])] * (count + too_many))

    def _answer(self, result: StepResult) -> None:
        if not self.scheduler.send(result):
            self.die(1)


@dataclass
class Sequence:
    """What a client knows of one of its sequences."""

    prompt: list[int]
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)
    finished: Finished | None = None


@dataclass
class Client:
    """One HTTP request."""

    name: str
    key: str
    sequences: list[Sequence]
    sent_ns: int = 0
    generation: Any = None
    asked_to_abort: bool = False
    outcome: str = ""  # how it ended

    def check(self, limit: int) -> None:
        for sequence in self.sequences:
            right, reason = oracle(sequence.prompt, sequence.sampling, limit, VOCAB)
            tokens, finished = sequence.tokens, sequence.finished
            expect(tokens == right[: len(tokens)], "wrong tokens")
            if finished is None:
                continue
            if finished.reason in ("stop", "length"):
                expect(tokens == right and finished.reason == reason, "ended too early")
            elif finished.reason == "abort":
                expect(self.asked_to_abort, "aborted without asking")
            else:
                known = ("error", "unavailable", "overloaded")
                expect(finished.reason in known, f"finished with {finished.reason}")


class FrontendProcess(Process):
    """The production link to the scheduler, and the clients of one HTTP process."""

    def __init__(self, world: "ServerWorld", index: int, epoch: int) -> None:
        super().__init__(world, "frontend", index, epoch)
        self.engine: engine.EngineClient | None = None
        self.clients: list[Client] = []
        self._inbox: list[Any] = []
        self._is_announced = False
        world.after(world.load_time(), self._start)

    def _start(self) -> None:
        if not self.is_alive:
            return
        world = self.world
        hello = Hello("frontend", self.index, self.pid, world.config_hash)
        self.launcher.send(hello)
        world.owner = self
        self.engine = engine.EngineClient("sim", self.index, hello, world.seconds)
        self.bind()
        self._tick()

    def _tick(self) -> None:
        if self.is_alive:
            if self.reads:
                self.launcher.send(Progress("frontend", self.index, "running"))
            self.world.after(SECOND, self._tick)

    def receive(self, message: Message) -> None:
        world = self.world
        if isinstance(message, Shutdown) and message.drain_s <= 0:
            self.die(0)
            return
        assert self.engine is not None
        world.owner = self
        self.engine._handle(message)  # type: ignore[arg-type]
        if not self._is_announced and self.engine.state.became_ready.is_set():
            self._is_announced = True
            self.launcher.send(Ready("frontend", self.index))
        for client in [c for c in self.clients if c.generation._pending]:
            self._read(client)
        if self.engine.state.draining and not self.clients:
            self.die(0)

    def submit(self, client: Client) -> None:
        world = self.world
        if self.engine is None or not self.reads or self.engine.state.why_not_ready():
            client.outcome = "refused"  # 503
            return
        pairs = [(s.prompt, s.sampling) for s in client.sequences]
        world.owner = self
        try:
            client.generation = self.engine.submit(pairs, name=client.name, tenant=client.key)
        except OverloadedError:
            client.outcome = "overloaded"
            return
        client.sent_ns = world.now_ns
        self.clients.append(client)

    def abort(self, client: Client) -> None:
        """The client leaves, or asks for its abort by name at any HTTP process."""
        if client not in self.clients or not self.reads:
            return
        assert self.engine is not None
        self.world.owner = self
        client.asked_to_abort = True
        client.generation.close()
        self.clients.remove(client)
        client.outcome = "left"

    def abort_named(self, name: str, key: str | None) -> None:
        if self.engine is not None and self.reads and self.is_alive:
            self.world.owner = self
            self.engine.abort_named(name, key)
            self.engine.tell_others(self.world.config.httpserver_workers, name, key)

    def _read(self, client: Client) -> None:
        with contextlib.closing(client.generation.receive()) as receiving:
            try:
                receiving.send(None)
            except StopIteration as stop:
                outputs = stop.value
        for output in outputs:
            sequence = client.sequences[output.index]
            expect(sequence.finished is None, "output after Finished")
            sequence.tokens += output.token_ids
            sequence.finished = output.finished
        client.check(self.world.limit)
        if all(sequence.finished for sequence in client.sequences):
            expect(not client.generation.is_open, "a generation stays open")
            self.clients.remove(client)
            client.outcome = "finished"

    def on_death(self) -> None:
        for client in self.clients:
            client.outcome = "disconnected"
        self.clients = []


class VirtualLoop:
    """The calls of an asyncio event loop that the production code makes."""

    def __init__(self, world: "ServerWorld") -> None:
        self._world = world

    def call_soon(self, call: Callable[[], None]) -> None:
        self.call_later(0, call)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        owner = self._world.owner

        def run() -> None:
            if owner.is_alive:
                self._world.owner = owner
                call()

        self._world.after(int(delay_s * SECOND), run)


@dataclass
class Plan:
    """What happens in one world."""

    scene: str = "mixed"  # or "flood", "crash loop", "never ready", "calm"
    num_clients: int = 12
    active_s: float = 4.0
    fail_kind: str = ""  # this fails ...
    fail_at: int = 0  # ... at its N-th time, from 1

    @classmethod
    def draw(cls, rng: random.Random) -> "Plan":
        scene = rng.choice(("mixed",) * 6 + ("flood",) * 2 + ("crash loop", "never ready"))
        if scene == "flood":  # processes that do not read, and full links
            return cls(scene, 30, 1.0)
        return cls(scene, rng.choice((6, 12, 20)), rng.choice((0.5, 2.0, 6.0)))


class ServerWorld:
    """All processes of one server."""

    def __init__(self, seed: int, plan: Plan | None = None, safety: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.plan = plan or Plan.draw(self.rng)
        self.safety = safety
        calm = self.plan.scene == "calm"
        self.high_water = 1000 if calm else self.rng.choice((4, 12, 1000))
        if self.plan.scene == "flood":
            self.high_water = self.rng.choice((4, 8))
        self.num_pages = 40
        self.limit = 32
        num_keys = 1 if calm else 2
        self.config = ServeConfig(
            tp=self.rng.choice((1, 2)),
            max_req_total_len=self.limit,
            page_size=self.rng.choice((2, 4)),
            running_max_req_size=4,
            batch_max_tokens=16,
            chunked_prefill_size=8,
            step_timeout_s=2.0,
            start_timeout_s=15.0,
            drain_timeout_s=5.0,
            max_queued_requests=4096 if calm else self.rng.choice((3, 4096)),
            httpserver_workers=1 if calm else self.rng.choice((1, 2)),
            api_key=("0" * 64,) * num_keys,
        )
        self.config_hash = self.config.config_hash()
        self.now_ns = 1000 * SECOND
        self.end_active_ns = 1 << 62  # set when the server is ready
        self.events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._pid = 100
        self.num_events = 0
        self.faults: Counter[str] = Counter()
        self.fired = 0  # how often `plan.fail_kind` could have failed
        self.links: list[Link] = []
        self.dropped: list[str] = []  # messages, in words
        self.bound: dict[str, Process] = {}
        self.plan_heard: dict[tuple[int, int], int] = {}
        self.heard_failures: defaultdict[int, int] = defaultdict(lambda: -1)
        self.owner: Any = None  # the process whose code runs
        self.clients: list[Client] = []
        self.children = Children(self)
        self.launcher_inbox: list[Any] = []
        self._launcher_due = False
        self._launcher_gone = False
        self.quiet_ns = 0  # a last loss, long after the others
        self.never_ready = self.plan.scene == "never ready"
        self.starts: list[tuple[int, str, int]] = []  # time, role, epoch
        self._log = hashlib.blake2b(digest_size=16)
        self.log_hash = ""

    # --- time and names ----------------------------------------------------------------------

    def at(self, time_ns: int, call: Callable[..., None], *args: Any) -> None:
        self._order += 1
        heapq.heappush(self.events, (time_ns, self._order, call, args))

    def after(self, delay_ns: int, call: Callable[..., None], *args: Any) -> None:
        self.at(self.now_ns + delay_ns, call, *args)

    def seconds(self) -> float:
        return self.now_ns / SECOND

    def load_time(self) -> int:
        return self.rng.randint(1, 40) * MS

    def new_pid(self) -> int:
        self._pid += 1
        return self._pid

    def address(self, role: str, index: int, epoch: int) -> str:
        return {"worker": f"worker-{epoch}-{index}", "frontend": f"frontend-{index}"}.get(
            role, role
        )

    def connect(self, address: str) -> Link:
        return Link(self, self.owner, address.rpartition("/")[2].removesuffix(".sock"))

    def make(self, role: str, index: int, epoch: int) -> Process:
        kinds = {"scheduler": SchedulerProcess, "worker": WorkerProcess}
        self.starts.append((self.now_ns, role, epoch))
        return kinds.get(role, FrontendProcess)(self, index, epoch)

    # --- faults ------------------------------------------------------------------------------

    def fires(self, kind: str) -> bool:
        """Whether this is the N-th time, which must fail."""
        if self.plan.fail_kind != kind:
            return False
        self.fired += 1
        if self.fired != self.plan.fail_at:
            return False
        self.faults[kind] += 1
        return True

    def step_fault(self) -> str:
        """How this step of the workers fails; "" if it does not."""
        for kind in WORKER_FAULTS:
            if self.fires(kind):
                return kind
        is_faulty = self.plan.scene == "mixed" and self.now_ns < self.end_active_ns
        if not is_faulty or self.rng.random() > 0.01:
            return ""
        kind = self.rng.choice(WORKER_FAULTS)
        self.faults[kind] += 1
        return kind

    def _fault(self) -> None:
        """Something happens to a process."""
        if self.supervisor.phase is not Phase.SERVING or self._launcher_gone:
            return
        role = self.rng.choice(("worker", "worker", "scheduler", "frontend"))
        processes = [p for p in self.children.of(role) if p.is_alive]
        if not processes:
            return
        process = self.rng.choice(processes)
        if self.rng.random() < 0.6:
            self.faults[f"{role} killed"] += 1
            process.die(STOPPED)
        else:
            self.faults[f"{role} frozen"] += 1
            process.freeze(self.rng.choice((50, 500, 3000, 14_000)) * MS)

    def _freeze(self) -> None:
        role = self.rng.choice(("frontend", "scheduler"))
        for process in self.children.of(role)[-1:]:
            self.faults[f"{role} frozen"] += 1
            process.freeze(self.rng.choice((50, 300, 1500)) * MS)

    def _crash_again(self) -> None:
        """In a crash loop the engine dies as soon as it is ready."""
        if self.now_ns < self.end_active_ns and self.supervisor.phase is Phase.SERVING:
            workers = self.children.of("worker")
            if workers and all(p.ready and p.is_alive for p in workers):
                self.faults["worker killed"] += 1
                workers[0].die(STOPPED)
            self.after(20 * MS, self._crash_again)

    # --- the launcher ------------------------------------------------------------------------

    def wake_launcher(self) -> None:
        if not self._launcher_due:
            self._launcher_due = True
            self.after(self.rng.choice((0, MS)), self._launcher_turn)

    @property
    def reads(self) -> bool:
        return True

    def receive(self, message: Message) -> None:
        self.launcher_inbox.append(message)
        self.wake_launcher()

    def _launcher_turn(self) -> None:
        self._launcher_due = False
        if self._launcher_gone:
            return
        self.owner = None
        inbox, self.launcher_inbox = self.launcher_inbox, []
        try:
            self.supervisor.reap()
            for message in inbox:
                self.supervisor.handle(message)
            self.supervisor.tick()
        except StartError:
            self.faults["failed start"] += 1
            self.children.kill(self.children.alive)
            self._launcher_gone = True
            return
        self._check_restarts()
        if self.supervisor.has_ended:
            self._launcher_gone = True
        else:
            self.after(int(self.supervisor.wait_s(1.0) * SECOND) + MS, self.wake_launcher)

    def _check_restarts(self) -> None:
        """The engine is not started more often than the back-off allows."""
        starts = [time_ns for time_ns, role, _ in self.starts if role == "worker"][
            :: self.config.tp
        ]
        for first, fifth in zip(starts, starts[5:], strict=False):
            expect(fifth - first >= 5 * SECOND, "six starts of the engine within 5 s")
        late = [time_ns for time_ns in starts if time_ns >= self.quiet_ns > 0]
        if self.quiet_ns and self.now_ns > self.quiet_ns + 200 * MS:
            expect(bool(late), "losses of long ago delay a restart")
        if self.never_ready:
            expect(len(starts) <= 4, "more than three restarts that did not help")
        epochs = {p.epoch for p in self.children.of("worker") if p.is_alive}
        expect(len(epochs) <= 1, "workers of two epochs")

    def _on_serving(self) -> None:
        rng, plan = self.rng, self.plan
        self.end_active_ns = self.now_ns + int(plan.active_s * SECOND)
        for number in range(plan.num_clients):
            self.at(rng.randrange(self.now_ns, self.end_active_ns), self._arrive, number)
        if plan.scene == "mixed":
            for _ in range(rng.choice((0, 1, 3, 6))):
                self.at(rng.randrange(self.now_ns, self.end_active_ns), self._fault)
            if rng.random() < 0.15:
                self.at(rng.randrange(self.now_ns, self.end_active_ns), self._leave)
        elif plan.scene == "flood":
            for _ in range(4):
                self.at(rng.randrange(self.now_ns, self.end_active_ns), self._freeze)
        elif plan.scene == "crash loop":
            self._crash_again()
            self.quiet_ns = self.end_active_ns + 70 * SECOND
            self.at(self.quiet_ns, self._kill_worker)
        elif plan.scene == "never ready":
            self.after(100 * MS, self._kill_worker)
        if self.safety:
            self.at(self.end_active_ns, self.events.clear)

    def _leave(self) -> None:
        self.faults["SIGTERM"] += 1
        self.supervisor.leave()
        self.wake_launcher()

    def _kill_worker(self) -> None:
        for process in self.children.of("worker")[:1]:
            self.faults["worker killed"] += 1
            process.die(STOPPED)

    # --- clients -----------------------------------------------------------------------------

    def _arrive(self, number: int) -> None:
        rng = self.rng
        sequences = []
        for _ in range(rng.choice((1, 1, 2))):
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
            sampling = SamplingParams(
                max_new_tokens=rng.choice((1, 4, 15)),
                temperature=1.0,
                seed=number + 1,
                stop_token_ids=rng.choice(((), (3,))),
            )
            sequences.append(Sequence(prompt, sampling))
        client = Client(f"name-{number}", rng.choice("ab"), sequences)
        self.clients.append(client)
        frontend = self.children.find("frontend", rng.randrange(self.config.httpserver_workers))
        if not isinstance(frontend, FrontendProcess) or not frontend.is_alive:
            client.outcome = "refused"
            return
        frontend.submit(client)
        chance = rng.random()
        if chance < 0.2:
            self.after(rng.randrange(30) * MS, self._abort, frontend, client)
        elif chance < 0.5 and self.plan.scene != "calm":  # a stranger knows its name
            self.after(rng.randrange(20) * MS, self._abort_named, client)

    def _abort(self, frontend: FrontendProcess, client: Client) -> None:
        if frontend.is_alive:
            frontend.abort(client)

    def _abort_named(self, client: Client) -> None:
        key = self.rng.choice("ab")
        frontends = [p for p in self.children.of("frontend") if p.is_alive]
        if frontends:
            client.asked_to_abort |= key == client.key
            self.rng.choice(frontends).abort_named(client.name, key)  # type: ignore[attr-defined]

    # --- the end -----------------------------------------------------------------------------

    def _is_at_rest(self) -> bool:
        if self._launcher_gone:
            return True
        if self.now_ns < max(self.end_active_ns, self.quiet_ns + SECOND) or not all(
            c.outcome for c in self.clients
        ):
            return False
        all_reads = all(p.reads and p.is_alive for p in self.children.alive)
        count = 1 + self.config.tp + self.config.httpserver_workers
        ready = [p for p in self.children.alive if p.ready or p.role == "scheduler"]
        is_whole = len(ready) == len(self.children.alive) == count and all_reads
        return is_whole and not self.num_live() and self.supervisor.phase is Phase.SERVING

    def num_live(self) -> int:
        """Requests that the scheduler knows."""
        scheduler = self.children.find("scheduler", 0)
        loop = scheduler.loop if isinstance(scheduler, SchedulerProcess) else None
        return 0 if loop is None else loop._core.num_live

    def run(self) -> None:
        """Run until everything is at rest, or until the middle of the faults."""
        self.bound["launcher"] = self  # type: ignore[assignment]
        self.supervisor = Supervisor(
            self.config,
            self.children,  # type: ignore[arg-type]
            mock.Mock(),
            mock.Mock(),
            self.seconds,
            self._on_serving,
        )
        try:
            self.supervisor.start()
        except StartError:
            self.faults["failed start"] += 1
            return
        self.wake_launcher()
        give_up_ns = self.now_ns + 60 * SECOND
        while self.events:
            self.num_events += 1
            if not self.num_events % 16:
                if self._is_at_rest():
                    break
                if self.supervisor.phase is not Phase.STARTING:
                    give_up_ns = max(give_up_ns, self.end_active_ns + REST_S * SECOND)
                expect(self.now_ns < give_up_ns, "the server does not come to rest")
                expect(self.num_events < 100_000, "too many events")
            self.now_ns, _, call, args = heapq.heappop(self.events)
            self._log.update(b"%d %s" % (self.now_ns, call.__name__.encode()))
            call(*args)
        self.log_hash = self._log.hexdigest()
        if not self.safety:
            self._check_rest()

    def _check_rest(self) -> None:
        for client in self.clients:
            expect(bool(client.outcome), "a client waits for ever")
        may_end = self.faults["SIGTERM"] or self.plan.scene in ("mixed", "never ready")
        expect(
            may_end or bool(self.plan.fail_kind) or not self._launcher_gone, "the server gave up"
        )
        if self._launcher_gone:
            expect(not self.children.alive, "a process outlives the server")


@contextlib.contextmanager
def _virtual(world: ServerWorld) -> Iterator[None]:
    """Production modules see the clock, the links and the dice of `world`."""
    sender = SimpleNamespace(connect=world.connect)
    receiver = SimpleNamespace(bind=lambda address: mock.Mock(malformed=0))
    clock = SimpleNamespace(monotonic_ns=lambda: world.now_ns)
    take = radix.PagePool.take

    def failing_take(pool: Any, count: int) -> Any:
        if count and world.fires("page"):
            raise MemoryError("no page")
        return take(pool, count)

    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    asyncio._set_running_loop(VirtualLoop(world))  # type: ignore[arg-type]
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, value in (
                (scheduler_loop, "Sender", sender),
                (scheduler_loop, "time", clock),
                (engine, "Sender", sender),
                (engine, "AsyncReceiver", receiver),
                (engine, "random", random.Random(world.seed)),
                (radix.PagePool, "take", failing_take),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
            yield
    finally:
        asyncio._set_running_loop(None)
        logging.disable(disabled)


def run(seed: int, plan: Plan | None = None, safety: bool = False) -> ServerWorld:
    """Run one seed. Raises Violation that names it."""
    world = ServerWorld(seed, plan, safety)
    try:
        with _virtual(world):
            world.run()
    except Exception as error:
        text = f"server seed {seed} at {world.seconds() - 1000:.3f} s: {type(error).__name__}: "
        text += f"{error}\n  {world.plan} {world.dropped[-3:]}\n  {world.config}"
        raise Violation(text) from error
    return world
