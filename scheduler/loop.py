"""Sockets and clock around the core: inbox -> `Scheduler.step` -> plan to the ranks, messages out.

Event-driven: it sleeps until a message comes, at most until the next heartbeat. The heartbeat is
sent from this loop and from nowhere else, so it stops when the scheduler does.
"""

import gc
import logging
import time

from ..shared.codec import encode
from ..shared.lifecycle import Child
from ..shared.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    FlushCache,
    Hello,
    LoadGrammar,
    Message,
    Ready,
    Shutdown,
    StepResult,
)
from ..shared.transport import Receiver, Sender, frontend_address, scheduler_address, worker_address
from .core import Scheduler
from .peers import Outgoing
from .step_stats import StepStats

HEARTBEAT_NS = 1_000_000_000
_log = logging.getLogger(__name__)


class Links:
    """The ways out: to the launcher, to frontends, and to the ranks of the worker group in use."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._frontends: dict[int, Sender] = {}
        self._workers: list[Sender] = []
        self._worker_epoch = -1

    def frontend(self, index: int) -> Sender:
        """The way to a frontend, opened on first use."""
        if index not in self._frontends:
            address = frontend_address(self._child.runtime_dir, index)
            self._frontends[index] = Sender.connect(address)
        return self._frontends[index]

    def reopen_frontend(self, index: int) -> None:
        """A new process took the place of a frontend: what was queued for the old one goes."""
        sender = self._frontends.pop(index, None)
        if sender is not None:
            sender.close()

    def workers(self, epoch: int) -> list[Sender]:
        """The ways to all ranks of `epoch`."""
        if epoch != self._worker_epoch:
            self.close_workers()
            self._worker_epoch = epoch
            for rank in range(self._child.config.tp):
                address = worker_address(self._child.runtime_dir, epoch, rank)
                self._workers.append(Sender.connect(address))
        return self._workers

    def send(self, outgoing: Outgoing) -> None:
        """Send one message of the core to where it belongs."""
        if outgoing.to == "launcher":
            self._child.launcher.send(outgoing.message)
        elif isinstance(outgoing.message, LoadGrammar):
            self.workers(outgoing.message.epoch)[outgoing.index].send(outgoing.message)
        else:
            self.frontend(outgoing.index).send(outgoing.message)

    def broadcast(self, message: Message) -> None:
        """To the launcher and every frontend."""
        data = encode(message)
        self._child.launcher.send_bytes(data)
        for index in range(self._child.config.httpserver_workers):
            self.frontend(index).send_bytes(data)

    def close_workers(self) -> None:
        """Close the ways to a group that is gone."""
        for sender in self._workers:
            sender.close()
        self._workers = []

    def close(self) -> None:
        """Close all but the launcher's; what is queued gets a moment to leave."""
        self.close_workers()
        for sender in self._frontends.values():
            sender.close()


class Greetings:
    """Who said Hello, and who must not take part: another version or another configuration."""

    def __init__(self, config_hash: str) -> None:
        self._config_hash = config_hash
        self._pids: dict[tuple[str, int], int] = {}
        self._refused: set[tuple[str, int]] = set()

    def is_new_process(self, hello: Hello) -> bool:
        """Note the Hello; whether it is from another process than the last of this place."""
        key = (hello.role, hello.index)
        is_new = self._pids.get(key) != hello.pid
        self._pids[key] = hello.pid
        return is_new

    def accepts(self, message: AnyMessage) -> bool:
        """Whether a Hello or Ready is from a process of the same version and configuration."""
        if isinstance(message, Hello):
            key = (message.role, message.index)
            same = message.config_hash == self._config_hash
            if same and message.protocol == PROTOCOL_VERSION:
                self._refused.discard(key)
                return True
            what = "configuration" if not same else f"protocol version {message.protocol}"
            _log.error("%s %d has another %s: ignored; restart the server", *key, what)
            self._refused.add(key)
            return False
        return not isinstance(message, Ready) or (message.role, message.index) not in self._refused


class SchedulerLoop:
    """Drives one `Scheduler` until Shutdown(0). `steps` and `step_time_s` say what its steps
    cost (`step_us` in the heartbeat is their mean)."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._core = Scheduler(child.config, child.epoch)
        self._links = Links(child)
        self._greetings = Greetings(child.config.config_hash())
        self._next_heartbeat_ns = 0
        self._checked = True  # pages were checked since the last request
        self._running = True
        self._stats = StepStats()
        self.steps = 0
        self.step_time_s = 0.0

    def run(self) -> None:
        """Serve until told to stop."""
        # The core makes no reference cycles, and a full collection walks every live object:
        # measured 10 to 200 ms at 256 rows, against 0.2 ms for a step.
        gc.freeze()
        gc.set_threshold(100_000, 50, 50)
        with Receiver.bind(scheduler_address(self._child.runtime_dir)) as receiver:
            try:
                while self._running:
                    wait_ns = self._next_heartbeat_ns - time.monotonic_ns()
                    inbox = receiver.receive(max(0.0, wait_ns / 1e9))
                    self.turn([m for m in inbox if self._take(m)])
                    if time.monotonic_ns() >= self._next_heartbeat_ns:
                        self._beat(receiver.malformed)
            finally:
                self._links.close()
                _log.info("stopped; %d steps, mean %.0f us", self.steps, self._step_us)

    def _take(self, message: AnyMessage) -> bool:
        """Look at a message before the core does; False keeps it from the core."""
        if not self._greetings.accepts(message):
            return False
        match message:
            case Hello(role="frontend") if self._greetings.is_new_process(message):
                self._links.reopen_frontend(message.index)
            case Shutdown(drain_s=drain_s) if drain_s <= 0:
                self._running = False
            case StepResult():
                self._stats.answered(message, time.monotonic_ns())
            case FlushCache():
                self._core.workers.flush_cache()
                return False
        return True

    def turn(self, inbox: list[AnyMessage]) -> None:
        """Give the core its messages and send out whatever it wants sent."""
        while True:
            started = time.monotonic_ns()
            plan, outbox = self._core.step(started, inbox)
            if plan is not None:
                data = encode(plan)
                for sender in self._links.workers(plan.epoch):
                    sender.send_bytes(data)
                self._stats.sent(plan, started)
            for outgoing in outbox:
                self._log_ready(outgoing.message)
                self._links.send(outgoing)
            if plan is None:
                break
            self.steps += 1
            self.step_time_s += (time.monotonic_ns() - started) / 1e9
            inbox = []
        if self._core.num_live:
            self._checked = False

    @property
    def _step_us(self) -> float:
        return self.step_time_s * 1e6 / max(1, self.steps)

    def _beat(self, malformed: int) -> None:
        heartbeat = self._core.heartbeat(malformed, self._step_us)
        self._links.broadcast(self._stats.fill(heartbeat))
        self._next_heartbeat_ns = time.monotonic_ns() + HEARTBEAT_NS
        if not self._core.num_live and not self._checked:
            self._core.check_integrity()
            self._checked = True

    def _log_ready(self, message: Message) -> None:
        if not isinstance(message, Ready):
            return
        wanted = self._child.config.max_req_total_len
        if wanted is not None and message.max_req_total_len < wanted:
            _log.warning(
                "KV memory holds %d pages of %d tokens: requests may have %d tokens in all, "
                "not %d (max_req_total_len)",
                message.num_pages,
                self._child.config.page_size,
                message.max_req_total_len,
                wanted,
            )
