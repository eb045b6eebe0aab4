"""Sockets and clock around the core: inbox -> `Scheduler.step` -> plan to the ranks, messages out.

The loop sleeps until a message comes, at most until the next heartbeat. The heartbeat is sent from
this loop and from nowhere else, so it stops when the scheduler does.
"""

import gc
import logging
import time

import msgspec

from ..shared.lifecycle import Child
from ..shared.log import dropped_lines
from ..shared.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Hello,
    Message,
    PeerLost,
    Ready,
    Shutdown,
    WorkerFailed,
)
from ..shared.transport import (
    Receiver,
    Sender,
    encode,
    frontend_address,
    scheduler_address,
    worker_address,
)
from .core import Outgoing, Scheduler

HEARTBEAT_NS = 1_000_000_000
_PAUSE_NS = 5 * HEARTBEAT_NS  # the clock was not read for longer: the process was stopped
logger = logging.getLogger(__name__)


class Links:
    """Sockets to the launcher, to the frontends, and to the ranks of the worker group in use."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._frontends: dict[int, Sender] = {}
        self._workers: list[Sender] = []
        self._worker_epoch = -1
        self._dropped = 0  # messages, by links that are closed
        self.full: set[int] = set()  # frontends that did not get a message

    @property
    def dropped(self) -> int:
        """Number of messages that were dropped because their receiver did not read."""
        links = [self._child.launcher, *self._frontends.values(), *self._workers]
        return self._dropped + sum(link.dropped for link in links)

    def full_rank(self) -> int:
        """A rank of the group in use that did not get a message; -1: none."""
        return next((rank for rank, link in enumerate(self._workers) if link.dropped), -1)

    def frontend(self, index: int) -> Sender:
        """The socket to a frontend, opened on first use."""
        if index not in self._frontends:
            address = frontend_address(self._child.runtime_dir, index)
            self._frontends[index] = Sender.connect(address)
        return self._frontends[index]

    def reopen_frontend(self, index: int) -> None:
        """A new process replaced a frontend: drop messages that are queued for the old one."""
        sender = self._frontends.pop(index, None)
        if sender is not None:
            self._dropped += sender.dropped
            sender.close()

    def workers(self, epoch: int) -> list[Sender]:
        """The sockets to all ranks of `epoch`."""
        if epoch != self._worker_epoch:
            self._close_workers()
            self._worker_epoch = epoch
            for rank in range(self._child.config.tp):
                address = worker_address(self._child.runtime_dir, epoch, rank)
                self._workers.append(Sender.connect(address))
        return self._workers

    def send(self, outgoing: Outgoing) -> None:
        """Send one message of the core to its destination."""
        if outgoing.to == "launcher":
            self._child.launcher.send(outgoing.message)
        elif outgoing.index in self.full:
            self._dropped += 1  # no message may follow one that was dropped
        elif not self.frontend(outgoing.index).send(outgoing.message):
            self.full.add(outgoing.index)

    def broadcast(self, message: Message) -> None:
        """Send a message to the launcher and to every frontend."""
        data = encode(message)
        self._child.launcher.send_bytes(data)
        for index in range(self._child.config.httpserver_workers):
            self.frontend(index).send_bytes(data)

    def _close_workers(self) -> None:
        for sender in self._workers:
            self._dropped += sender.dropped
            sender.close()
        self._workers = []

    def close(self) -> None:
        """Close all but the launcher's. Queued messages get a moment to leave."""
        self._close_workers()
        for sender in self._frontends.values():
            sender.close()


class Greetings:
    """Which processes said Hello, and which must not take part: those of another version or
    configuration."""

    def __init__(self, config_hash: str) -> None:
        self._config_hash = config_hash
        self._pids: dict[tuple[str, int], int] = {}
        self._refused: set[tuple[str, int]] = set()

    def accepts(self, message: Hello | Ready) -> bool:
        """Whether it is from a process of the same version and configuration."""
        key = (message.role, message.index)
        if isinstance(message, Ready):
            return key not in self._refused
        if message.config_hash != self._config_hash:
            difference = "another configuration"
        elif message.protocol != PROTOCOL_VERSION:
            difference = f"another protocol version {message.protocol}"
        else:
            self._refused.discard(key)
            return True
        logger.error("%s %d has %s: ignored; restart the server", *key, difference)
        self._refused.add(key)
        return False

    def is_new_process(self, hello: Hello) -> bool:
        """Note the Hello. Returns whether another process than before has this role and index."""
        key = (hello.role, hello.index)
        is_new = self._pids.get(key) != hello.pid
        self._pids[key] = hello.pid
        return is_new


class SchedulerLoop:
    """Drives one `Scheduler` until Shutdown(0). `steps` counts its plans, and `step_time_s` is the
    time that they took to make and send."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._core = Scheduler(child.config, child.epoch)
        self._links = Links(child)
        self._greetings = Greetings(child.config.config_hash())
        self._next_heartbeat_ns = 0
        self._checked = True  # pages were checked since the last message
        self._running = True
        self.steps = 0
        self.step_time_s = 0.0
        self._read_ns = 0  # when the clock was read last
        self._paused_ns = 0  # time in which this process was stopped: no step is late for that

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
                    if self.take(inbox, receiver.malformed):
                        receiver.repair()
            finally:
                self._links.close()
                logger.info("stopped; %d steps, mean %.0f us", self.steps, self._step_us)

    def take(self, inbox: list[AnyMessage], malformed: int) -> bool:
        """Work on messages that have arrived. Returns whether a heartbeat was sent."""
        self.turn([message for message in inbox if self._accepts(message)])
        if time.monotonic_ns() < self._next_heartbeat_ns:
            return False
        self._beat(malformed)
        return True

    def _now_ns(self) -> int:
        """The time for the core. It stands still while this process is stopped, at any line."""
        clock_ns = time.monotonic_ns()
        if self._read_ns and clock_ns - self._read_ns > _PAUSE_NS:
            self._paused_ns += clock_ns - self._read_ns
        self._read_ns = clock_ns
        return clock_ns - self._paused_ns

    def _accepts(self, message: AnyMessage) -> bool:
        """Look at a message before the core does. False if the core must not see it."""
        match message:
            case Hello() | Ready() if not self._greetings.accepts(message):
                return False
            case Hello(role="frontend") if self._greetings.is_new_process(message):
                self._links.reopen_frontend(message.index)
            case Shutdown(drain_s=drain_s) if drain_s <= 0:
                self._running = False
        return True

    @property
    def is_running(self) -> bool:
        """Whether it was not told to stop."""
        return self._running

    def turn(self, inbox: list[AnyMessage]) -> None:
        """Give the core its messages, and send its plans and messages."""
        self._checked = self._checked and not inbox
        while True:
            started = self._now_ns()
            plan, outbox = self._core.step(started, inbox)
            if plan is not None:
                data = encode(plan)
                for sender in self._links.workers(plan.epoch):
                    sender.send_bytes(data)
            for outgoing in outbox:
                if isinstance(outgoing.message, Ready):
                    self._log_ready(outgoing.message)
                self._links.send(outgoing)
            if plan is None:
                break
            self.steps += 1
            self.step_time_s += (self._now_ns() - started) / 1e9
            inbox = []
        if self._links.full:
            self._cut_frontends()

    def _cut_frontends(self) -> None:
        """Frontends that do not read have lost messages: abort their requests, and tell them to
        end the streams once they read again."""
        for index in self._links.full:
            logger.error("frontend %d does not read its messages: its requests are aborted", index)
            self._links.reopen_frontend(index)
            self._core.cut_frontend(index)
            lost = PeerLost("frontend", index, "this process did not read its messages")
            self._links.frontend(index).send(lost)
        self._links.full.clear()

    @property
    def _step_us(self) -> float:
        return self.step_time_s * 1e6 / max(1, self.steps)

    def _beat(self, malformed: int) -> None:
        beat = self._core.heartbeat(malformed, self._step_us)
        num_dropped = self._links.dropped
        if (rank := self._links.full_rank()) >= 0:
            epoch = self._core.workers.epoch
            self._child.launcher.send(WorkerFailed(epoch, rank, "it does not read its plans"))
        beat = msgspec.structs.replace(
            beat, dropped_messages=num_dropped, dropped_log_lines=dropped_lines()
        )
        self._links.broadcast(beat)
        self._next_heartbeat_ns = time.monotonic_ns() + HEARTBEAT_NS
        if not self._core.num_live and not self._checked:
            self._core.check_integrity()
            self._checked = True

    def _log_ready(self, ready: Ready) -> None:
        wanted = self._child.config.max_req_total_len
        if wanted is not None and ready.max_req_total_len < wanted:
            logger.warning(
                "KV memory holds %d pages of %d tokens: requests may have %d tokens in all, "
                "not %d (max_req_total_len)",
                ready.num_pages,
                self._child.config.page_size,
                ready.max_req_total_len,
                wanted,
            )
