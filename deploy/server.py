"""Keeps one server's processes alive and ends them all: a small state machine around one wait.

Messages in the launcher's inbox, ended children and signals arrive; each is handled to its end.
How losses are mended is in `Server._lost`; the processes themselves are in `supervise.py`.
"""

import contextlib
import enum
import logging
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from ..shared.config import ServeConfig
from ..shared.errors import ConfigError
from ..shared.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Heartbeat,
    Hello,
    Message,
    PeerLost,
    Progress,
    Ready,
    Shutdown,
    WorkerFailed,
)
from ..shared.transport import (
    Receiver,
    Sender,
    frontend_address,
    launcher_address,
    scheduler_address,
    worker_address,
)
from .listen import HttpPort
from .progress import StartDisplay
from .supervise import Children, JanitorKeeper, Process, start_error

_log = logging.getLogger(__name__)

_TICK_S = 1.0
_SLOW_TICK_S = 0.1  # without pidfds
_STOP_WAIT_S = 5.0  # for processes to follow a Shutdown
_DRAIN_GRACE_S = 3.0  # for frontends to end what the drain left over
_EXIT_WAIT_S = 1.0  # for a worker that said it failed, so that its exit code is known
_RESTART_WINDOW_S = 600.0
_MAX_RESTARTS = {"engine": 3, "frontend": 10}  # in the window above
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Phase(enum.Enum):
    """STARTING until all frontends listen; a loss then ends the start. SERVING: losses are mended.
    DRAINING: frontends finish their streams, only workers are replaced. STOPPING: all end."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    DRAINING = enum.auto()
    STOPPING = enum.auto()


class Server:
    """One server's processes from start to end."""

    def __init__(
        self,
        config: ServeConfig,
        runtime_dir: Path,
        children: Children,
        janitor: JanitorKeeper,
        port: HttpPort,
        started: float,
        on_ready: Callable[["Server", str], None] | None,
    ) -> None:
        self._config = config
        self._runtime_dir = str(runtime_dir)
        self._children = children
        self._janitor = janitor
        self._port = port
        self._started = started
        self._on_ready = on_ready
        self._phase = Phase.STARTING
        self._exit_code = 0
        self._epoch = 0
        self._capacity = 0  # KV tokens, from the scheduler's Ready
        self._engine_ready = False
        self._engine_ready_at = 0.0
        self._deadline = 0.0  # of the drain or stop
        self._stop_requests = 0
        self._restarts: dict[str, deque[float]] = {kind: deque() for kind in _MAX_RESTARTS}
        self._due: dict[tuple[str, int], float] = {}  # (role, index) -> when to start it
        self._senders: dict[tuple[str, int], Sender] = {}
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    def run(self) -> int:
        """Start, serve, stop. Returns the exit code; raises StartError if the start fails."""
        self._display = StartDisplay()
        with (
            Receiver.bind(launcher_address(self._runtime_dir)) as inbox,
            _handlers(self.stop, self._wake_write.fileno()),
        ):
            try:
                self._start_everything()
                while self._phase is not Phase.STOPPING or self._children.alive:
                    self._wait(inbox)
            finally:
                self._display.close()
                self._children.close()
                for sender in self._senders.values():
                    sender.close()
                self._wake_read.close()
                self._wake_write.close()
        return self._exit_code

    def stop(self) -> None:
        """Drain and stop, as SIGTERM does; a second call stops at once. From any thread."""
        self._stop_requests += 1
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    # --- events -----------------------------------------------------------------------------

    def _wait(self, inbox: Receiver) -> None:
        sentinels = [process.sentinel for process in self._children.alive]
        watched = [fd for fd in (*sentinels, self._janitor.sentinel) if fd is not None]
        tick = _SLOW_TICK_S if None in sentinels else _TICK_S
        until_due = [at - time.monotonic() for at in self._due.values()]
        inbox.wait([self._wake_read.fileno(), *watched], max(0.0, min([tick, *until_due])))
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(64)
        for message in inbox.receive(0):
            self._handle(message)
        self._janitor.check()
        # The scheduler first: its loss covers the workers'.
        for process, reason in sorted(
            self._children.reap(), key=lambda ended: ended[0].role != "scheduler"
        ):
            self._lost(process, reason)
        self._follow_requests()
        self._tick(time.monotonic())

    def _follow_requests(self) -> None:
        if self._stop_requests == 0:
            return
        if self._stop_requests > 1 or self._phase is Phase.STARTING:
            self._stop(0)
        elif self._phase is Phase.SERVING:
            self._drain()

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case Hello(role, index, _, config_hash, protocol):
                self._check_hello(role, index, config_hash, protocol)
                self._hear(role, index)
            case Progress(role, index, stage, done, total):
                self._hear(role, index, stage)
                if self._phase is Phase.STARTING:
                    self._display.update(f"{role} {index}", stage, done, total)
            case Ready():
                self._hear(message.role, message.index)
                self._on_peer_ready(message)
            case Heartbeat():
                self._hear("scheduler", 0)
            case WorkerFailed(epoch, rank, reason):
                process = self._children.find("worker", rank)
                if epoch == self._epoch and process is not None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.popen.wait(_EXIT_WAIT_S)
                    self._children.kill([process])
                    self._lost(process, reason)
            case _:
                _log.warning("unexpected %s in the launcher's inbox", type(message).__name__)

    def _hear(self, role: str, index: int, stage: str = "") -> None:
        process = self._children.find(role, index)
        if process is not None:
            process.heard = time.monotonic()
            process.stage = stage or process.stage

    def _check_hello(self, role: str, index: int, config_hash: str, protocol: int) -> None:
        if protocol == PROTOCOL_VERSION and config_hash == self._config.config_hash():
            return
        problem = ConfigError(
            f"{role} {index} runs another version or configuration (protocol {protocol}, config "
            f"{config_hash}; here {PROTOCOL_VERSION}, {self._config.config_hash()}); was the "
            "package changed while the server ran?"
        )
        if self._phase is Phase.STARTING:
            raise problem
        self._give_up(str(problem), problem.exit_code)

    def _on_peer_ready(self, ready: Ready) -> None:
        process = self._children.find(ready.role, ready.index)
        if process is None or (ready.role != "frontend" and ready.epoch != self._epoch):
            return  # word of a process that is gone
        process.ready = True
        if ready.role == "worker":
            self._port.share_with_successor()  # frontends listen once the scheduler knows, too
        if ready.role == "scheduler":
            self._capacity = ready.num_pages * self._config.page_size
            self._engine_ready = True
            self._engine_ready_at = time.monotonic()
            if self._phase is Phase.SERVING:
                _log.info("the engine is ready again (epoch %d)", ready.epoch)
        frontends = self._children.of("frontend")
        if self._phase is Phase.STARTING and all(p.ready for p in frontends):
            self._phase = Phase.SERVING
            self._announce()

    def _announce(self) -> None:
        self._display.close()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._config.host, self._config.host)
        url = f"http://{f'[{host}]' if ':' in host else host}:{self._config.port}"
        with contextlib.suppress(OSError):  # nobody has to read it
            print(
                f"Glimmer is ready: {url}  model {self._config.model_name}  KV cache "
                f"{self._capacity:,} tokens  started in {time.monotonic() - self._started:.1f} s",
                flush=True,
            )
        if self._on_ready is not None:
            self._on_ready(self, url)

    # --- losses -----------------------------------------------------------------------------

    def _lost(self, process: Process, reason: str) -> None:
        """A child ended. While starting that ends the start; later it is mended or expected."""
        if self._phase is Phase.STOPPING:
            return
        code = process.popen.returncode
        if self._phase is Phase.STARTING:
            raise start_error(code, f"{process.name} failed while {process.stage}: {reason}")
        if self._phase is Phase.DRAINING and process.role == "frontend" and code == 0:
            return
        _log.error("lost %s (pid %d): %s", process.name, process.popen.pid, reason)
        epoch = process.epoch if process.role == "worker" else -1
        loss = PeerLost(process.role, process.index, reason, epoch)
        if process.role == "frontend":
            self._send("scheduler", 0, loss)
            if self._phase is Phase.SERVING and self._may_restart("frontend", loss, code):
                self._restart("frontend", [process.index])
        elif process.role == "scheduler":
            self._children.kill(self._children.of("worker"))
            self._tell_frontends(loss)
            self._due.clear()
            if self._phase is Phase.SERVING and self._may_restart("engine", loss, code):
                self._restart_engine()
        elif process.epoch == self._epoch:
            self._children.kill(self._children.of("worker"))
            self._send("scheduler", 0, loss)
            if self._may_restart("engine", loss, code):
                self._restart_engine()

    def _may_restart(self, kind: str, loss: PeerLost, code: int | None) -> bool:
        """Count a restart; over the limit the server gives up."""
        recent, now = self._restarts[kind], time.monotonic()
        while recent and recent[0] < now - _RESTART_WINDOW_S:
            recent.popleft()
        if len(recent) < _MAX_RESTARTS[kind]:
            recent.append(now)
            return True
        minutes = _RESTART_WINDOW_S / 60
        self._give_up(
            f"{len(recent)} restarts of the {kind} in {minutes:.0f} minutes did not help; last: "
            f"{loss.role} {loss.index}: {loss.reason}",
            start_error(code, "").exit_code,
        )
        return False

    def _restart_engine(self) -> None:
        self._epoch += 1
        self._engine_ready = False
        if self._children.find("scheduler", 0) is None:
            self._restart("scheduler", [0])
        self._restart("worker", list(range(self._config.tp)))

    def _restart(self, role: str, indices: list[int]) -> None:
        kind = "frontend" if role == "frontend" else "engine"
        delay = 0.5 * (2 ** (len(self._restarts[kind]) - 1) - 1)  # none the first time
        for index in indices:
            self._due[role, index] = time.monotonic() + delay

    def _give_up(self, reason: str, exit_code: int) -> None:
        _log.error("giving up: %s", reason)
        self._tell_frontends(PeerLost("scheduler", 0, reason))
        self._stop(exit_code)

    # --- actions ----------------------------------------------------------------------------

    def _start_everything(self) -> None:
        self._spawn("scheduler", 0)
        for rank in range(self._config.tp):
            self._spawn("worker", rank)
        for index in range(self._config.httpserver_workers):
            self._spawn("frontend", index)

    def _spawn(self, role: str, index: int) -> None:
        old = self._senders.pop((role, index), None)
        if old is not None:  # with what the dead process did not read
            old.close()
        process = self._children.spawn(role, index, self._epoch)
        self._senders[role, index] = Sender.connect(self._address(role, index))
        if self._phase is Phase.STARTING:
            self._display.update(process.name, process.stage)
        else:
            _log.info("started %s again (pid %d)", process.name, process.popen.pid)

    def _tick(self, now: float) -> None:
        """What time brings: restarts that are due, silence, the end of patience."""
        if self._phase is Phase.STOPPING:
            if now > self._deadline:
                self._children.kill(list(self._children.alive))
            return
        for role, index in [key for key, at in self._due.items() if at <= now]:
            del self._due[role, index]
            if role != "frontend" or self._phase is Phase.SERVING:
                self._spawn(role, index)
        stuck = self._stuck(now)
        if stuck is not None:
            self._children.kill([stuck])
            self._lost(stuck, f"silent for {now - stuck.heard:.0f} s")
        ended = not self._children.of("frontend") or now > self._deadline
        if self._phase is Phase.DRAINING and ended:
            self._stop(0)

    def _stuck(self, now: float) -> Process | None:
        """A process that hangs in silence: a starting one without progress, a scheduler without
        heartbeat. Nobody is blamed while it has to wait for another."""
        config = self._config
        workers = self._children.of("worker")
        for process in workers:
            if not process.ready and now - process.heard > config.start_timeout_s:
                return process
        scheduler = self._children.find("scheduler", 0)
        if scheduler and len(workers) == config.tp and all(p.ready for p in workers):
            patience = config.step_timeout_s if self._engine_ready else config.start_timeout_s
            if now - max(p.heard for p in (scheduler, *workers)) > patience:
                return scheduler
        for process in self._children.of("frontend") if self._engine_ready else ():
            since = max(process.heard, self._engine_ready_at)
            if not process.ready and now - since > config.start_timeout_s:
                return process
        return None

    def _drain(self) -> None:
        seconds = self._config.drain_timeout_s
        _log.info("stopping: running requests get %.0f s to finish", seconds)
        self._phase = Phase.DRAINING
        self._deadline = time.monotonic() + seconds + _DRAIN_GRACE_S
        self._tell_frontends(Shutdown(seconds))
        self._send("scheduler", 0, Shutdown(seconds))

    def _stop(self, exit_code: int) -> None:
        if self._phase is Phase.STOPPING:
            return
        # Who still loads does not listen, and nothing is lost with it.
        patience = 0.0 if self._phase is Phase.STARTING else _STOP_WAIT_S
        self._phase = Phase.STOPPING
        self._exit_code = exit_code
        self._deadline = time.monotonic() + patience
        for process in self._children.alive:
            self._send(process.role, process.index, Shutdown(0.0))

    def _tell_frontends(self, message: Message) -> None:
        for process in self._children.of("frontend"):
            self._send("frontend", process.index, message)

    def _send(self, role: str, index: int, message: Message) -> None:
        """To a process that was started at least once; the dead get it with their sender."""
        self._senders[role, index].send(message)

    def _address(self, role: str, index: int) -> str:
        directory = self._runtime_dir
        if role == "frontend":
            return frontend_address(directory, index)
        if role == "scheduler":
            return scheduler_address(directory)
        return worker_address(directory, self._epoch, index)


@contextlib.contextmanager
def _handlers(on_signal: Callable[[], None], wake_fd: int) -> Iterator[None]:
    """Route stop signals to `on_signal` and let them end a wait."""
    previous_fd = signal.set_wakeup_fd(wake_fd, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, lambda *_: on_signal()) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
