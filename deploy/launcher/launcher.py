"""Starts one server's processes, replaces those that die, and stops them all.

A state machine around one wait: the launcher waits for messages in its inbox, for the end of a
child, and for signals. `_lost` decides what a dead child means for the others; `supervise.py` knows
how a process is started and killed.
"""

import contextlib
import enum
import logging
import math
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from ...shared.config import ServeConfig
from ...shared.errors import ConfigError, GpuError, StartError
from ...shared.lifecycle import CONFIG_FILE
from ...shared.log import dropped_lines, write_aside
from ...shared.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Counts,
    Heartbeat,
    Hello,
    LauncherBeat,
    Message,
    PeerLost,
    Progress,
    Ready,
    Reload,
    Shutdown,
    WorkerFailed,
)
from ...shared.transport import Receiver, launcher_address
from .gpu_health import GpuHealth
from .listen import HttpPort
from .progress import StartDisplay
from .restarts import ENGINE, Restarts
from .signals import can_open_terminal, handlers
from .supervise import Children, JanitorKeeper, Process, start_error
from .totals import Totals

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_SLOW_TICK_S = 0.1  # on kernels without pidfds, where the end of a child does not end a wait
_STOP_WAIT_S = 5.0  # processes that got a Shutdown are killed after this time
_SETTLE_S = 0.3  # for the first request on a connection that was just made
_DRAIN_GRACE_S = 3.0  # frontends end the streams that outlast the drain within this time
_EXIT_WAIT_S = 1.0  # a worker that reported a failure exits within this time, or is killed
# The scheduler's main loop never waits for a worker, so a slow step delays no heartbeat.
HEARTBEAT_LIMIT_S = 10.0
# A frontend also parses bodies and renders prompts. Killing it breaks its streams.
FRONTEND_LIMIT_S = 30.0
# A longer time between two ticks means that this process was suspended, perhaps with its children.
_PAUSE_S = 5.0
_RUNNING = "running"  # the last stage; a scheduler enters it with its first heartbeat


class Phase(enum.Enum):
    """STARTING lasts until all frontends listen: a loss ends the start. SERVING: lost processes
    are restarted. DRAINING: frontends finish their streams and only workers are restarted.
    STOPPING: all processes end."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    DRAINING = enum.auto()
    STOPPING = enum.auto()


class Launcher:
    """Runs one server's processes from start to end."""

    def __init__(
        self,
        config: ServeConfig,
        children: Children,
        janitor: JanitorKeeper,
        port: HttpPort,
        started: float,
        on_ready: Callable[["Launcher", str], None] | None,
    ) -> None:
        """`started` is the monotonic time at which the command began. `on_ready` is called once,
        with this launcher and the server's URL."""
        self._config = config
        self._children = children
        self._janitor = janitor
        self._port = port
        self._started = started
        self._on_ready = on_ready
        self._phase = Phase.STARTING
        self._exit_code = 0
        self._epoch = 0  # number of the engine's current incarnation
        self._capacity = 0  # KV tokens, from the scheduler's Ready
        self._engine_ready_at = math.inf  # infinite while the engine is not ready
        self._is_leaving = False  # SIGTERM came
        # When clients can make no new connections, and when requests are refused; then infinite.
        self._settle_at = self._drain_at = math.inf
        self._deadline = 0.0  # of the drain or stop
        self._stop_requests = 0
        self._is_reload_asked = False
        self._has_terminal = can_open_terminal()
        self._restarts = Restarts()
        self._stalled = False  # the stacks of this stall are in the log
        self._num_stalls = 0
        self._totals = Totals()  # of frontends
        self._worker_losses = Totals()  # log lines
        self.gpus: GpuHealth | None = None  # None: they are not watched; set before `run`
        self._dir_problem = ""
        self._last_tick = started
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    def run(self) -> int:
        """Start, serve, stop. Returns the exit code. Raises StartError if the start fails."""
        self._display = StartDisplay(as_log=self._config.log_format != "text")
        self._next_beat = self._started
        with (
            Receiver.bind(launcher_address(str(self._children.runtime_dir))) as inbox,
            handlers(self.stop, self._hang_up, self._wake_write.fileno()),
        ):
            self._inbox = inbox
            try:
                self._start_everything()
                while self._phase is not Phase.STOPPING or self._children.alive:
                    self._wait(inbox)
            finally:
                self._display.close()
                self._children.close()
                self._wake_read.close()
                self._wake_write.close()
        return self._exit_code

    def stop(self) -> None:
        """Drain and stop, as SIGTERM does. A second call stops at once. Thread-safe."""
        self._stop_requests += 1
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    def _hang_up(self) -> None:
        """SIGHUP: read key and certificate files again. Stop if there are none, or if the signal
        came because the terminal was closed."""
        is_closed = self._has_terminal and not can_open_terminal()
        if self._config.can_reload and not is_closed:
            self._is_reload_asked = True
        else:
            self.stop()

    # --- events -----------------------------------------------------------------------------

    def _wait(self, inbox: Receiver) -> None:
        """Wait for the next event, then handle everything that has happened."""
        sentinels = [process.sentinel for process in self._children.alive]
        fds = (*sentinels, self._janitor.sentinel, self.gpus.fileno() if self.gpus else None)
        watched = [fd for fd in fds if fd is not None]
        tick = _SLOW_TICK_S if None in sentinels else _TICK_S
        next_phase = max(0.0, min(self._settle_at, self._drain_at) - time.monotonic())
        limit = self._restarts.wait_s(min(tick, next_phase))
        inbox.wait([self._wake_read.fileno(), *watched], limit)
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(64)
        self._reap()
        for message in inbox.receive(0):
            self._handle(message)
        self._janitor.check()
        self._check_gpus()
        self._follow_requests()
        self._tick(time.monotonic())

    def _reap(self) -> None:
        """Handle all children that ended. The scheduler comes first, because its loss includes
        that of the workers. Killed processes come next: others may have failed because of them."""
        ended = self._children.reap()
        ended.sort(key=lambda e: (e[0].role != "scheduler", e[0].popen.returncode >= 0))
        for process, reason in ended:
            self._lost(process, reason)

    def _check_gpus(self) -> None:
        """End the server if a GPU is lost: another start on it would not help."""
        if self.gpus is None or self._phase is Phase.STOPPING:
            return
        self.gpus.read()
        if self.gpus.fault and self._phase is Phase.STARTING:
            raise GpuError(self.gpus.fault)
        if self.gpus.fault:
            self._give_up(self.gpus.fault, GpuError.exit_code)

    def _follow_requests(self) -> None:
        if self._is_reload_asked:
            self._is_reload_asked = False
            self._tell("frontend", Reload())
        if self._stop_requests == 0:
            return
        if self._stop_requests > 1 or self._phase is Phase.STARTING:
            self._stop(0)
        elif self._phase is Phase.SERVING and not self._is_leaving:
            self._leave()

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case Hello(role, index, pid, config_hash, protocol):
                self._check_hello(role, index, config_hash, protocol)
                process = self._hear(role, index)
                if process is not None and process.popen.pid == pid:
                    process.greeted = True
            case Progress(role, index, stage, done, total):
                self._hear(role, index, stage, done, total)
            case Ready():
                self._on_peer_ready(message)
            case Heartbeat(stall=stall):
                self._hear("scheduler", 0, _RUNNING)
                if stall and not self._stalled:
                    self._num_stalls += 1
                    logger.warning("%s", stall)
                    self._children.log_stacks("a step does not end")
                self._stalled = bool(stall)
            case Counts(role="worker"):
                self._worker_losses.add(message)
            case Counts(index=index):
                self._totals.add(message)
                if (process := self._hear("frontend", index)) is not None:
                    process.sender.send(self._launcher_beat(index))
            case WorkerFailed(epoch, rank, reason):
                process = self._children.find("worker", rank)
                if epoch == self._epoch and process is not None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.popen.wait(_EXIT_WAIT_S)
                    self._reap()
                    self._end(process, reason)  # nothing if it has ended
            case _:
                logger.warning("unexpected %s in the launcher's inbox", type(message).__name__)

    def _hear(
        self, role: str, index: int, stage: str = "", done: int = 0, total: int = 0
    ) -> Process | None:
        process = self._children.find(role, index)
        if process is None:
            return None
        process.heard = time.monotonic()
        if stage and (total or stage != process.stage):
            process.stage = stage
            if self._phase is Phase.STARTING:
                self._display.update(process.name, stage, done, total)
        return process

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
            return  # from a process that is gone
        process.ready = True
        self._hear(ready.role, ready.index, _RUNNING)
        if ready.role == "worker":
            self._port.share_with_successor()  # frontends listen only after the scheduler is ready
        else:
            self._restarts.helped(process)
        if ready.role == "scheduler":
            self._capacity = ready.num_pages * self._config.page_size
            self._engine_ready_at = time.monotonic()
            if self._phase is Phase.SERVING:
                logger.info("the engine is ready again (epoch %d)", ready.epoch)
        frontends = self._children.of("frontend")
        if self._phase is Phase.STARTING and all(process.ready for process in frontends):
            self._phase = Phase.SERVING
            self._announce()

    def _announce(self) -> None:
        self._display.close()
        logger.info("worker 0: %s", self._display.spent("worker 0"))
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._config.host, self._config.host)
        name = f"[{host}]" if ":" in host else host
        scheme = "http" if self._config.ssl_certfile is None else "https"
        url = f"{scheme}://{name}:{self._config.port}"
        if self._config.metrics_port is not None:
            logger.info("probes and metrics: http://%s:%d", name, self._config.metrics_port)
        line = (
            f"Glimmer is ready: {url}  model {self._config.model_name}  KV cache "
            f"{self._capacity:,} tokens  started in {time.monotonic() - self._started:.1f} s\n"
        )
        write_aside(sys.stdout.fileno(), line)
        if self._on_ready is not None:
            self._on_ready(self, url)

    # --- losses -----------------------------------------------------------------------------

    def _end(self, process: Process, reason: str) -> None:
        """Kill a child that hangs or cannot go on, unless it already ended."""
        if process in self._children.alive:
            self._children.log_stacks(f"{process.name} is killed ({reason.partition(';')[0]})")
            self._children.kill([process])
            self._lost(process, reason)

    def _lost(self, process: Process, reason: str) -> None:
        """A child ended. That ends a start; later, the child is restarted unless it was to end."""
        if self._phase is Phase.STOPPING:
            return
        code = process.popen.returncode
        if self._phase is Phase.STARTING:
            raise start_error(code, f"{process.name} failed while {process.stage}: {reason}")
        if self._phase is Phase.DRAINING and process.role == "frontend" and code == 0:
            return
        logger.error("lost %s (pid %d): %s", process.name, process.popen.pid, reason)
        if process.role == "frontend":
            self._tell("scheduler", PeerLost("frontend", process.index, reason))
            if self._phase is Phase.SERVING:
                self._restart(process, reason, [("frontend", process.index)])
        elif process.role == "scheduler" or process.epoch == self._epoch:
            self._lost_engine(process, reason)

    def _lost_engine(self, process: Process, reason: str) -> None:
        """The scheduler or a worker of the current epoch ended, which ends the epoch. Workers of
        an earlier epoch are ignored, so a second death in the same wait changes nothing more."""
        self._epoch += 1
        self._engine_ready_at = math.inf
        self._children.kill(self._children.of("worker"))
        workers = [("worker", rank) for rank in range(self._config.tp)]
        self._restarts.cancel(workers)
        if process.role == "worker":
            self._tell("scheduler", PeerLost("worker", process.index, reason, process.epoch))
            self._restart(process, reason, workers)
        else:
            self._tell("frontend", PeerLost("scheduler", 0, reason))
            if self._phase is Phase.SERVING:
                self._restart(process, reason, [("scheduler", 0), *workers])

    def _restart(self, lost: Process, reason: str, starts: list[tuple[str, int]]) -> None:
        """Schedule these (role, index) to start, or stop if that has not helped before."""
        problem = self._restarts.lost(lost, starts)
        if problem:
            code = start_error(lost.popen.returncode, "").exit_code
            self._give_up(f"{problem}: {reason}", code)

    def _give_up(self, reason: str, exit_code: int) -> None:
        logger.error("giving up: %s", reason)
        self._tell("frontend", PeerLost("scheduler", 0, reason))
        self._stop(exit_code)

    # --- actions ----------------------------------------------------------------------------

    def _start_everything(self) -> None:
        self._spawn("scheduler", 0)
        for rank in range(self._config.tp):
            self._spawn("worker", rank)
        for index in range(self._config.httpserver_workers):
            self._spawn("frontend", index)

    def _spawn(self, role: str, index: int) -> None:
        try:
            process = self._children.spawn(role, index, self._epoch)
        except OSError as error:  # too many files or processes, no memory
            if self._phase is Phase.STARTING:
                raise StartError(f"cannot start {role} {index}: {error}") from error
            logger.error("cannot start %s %d: %s; trying again", role, index, error)
            self._restarts.schedule(f"{role} {index}", [(role, index)])
            return
        if self._phase is Phase.STARTING:
            self._display.update(process.name, process.stage)
        else:
            logger.info("started %s again (pid %d)", process.name, process.popen.pid)

    def _tick(self, now: float) -> None:
        """Everything that depends on time: due restarts, silent processes, the deadline."""
        if self._phase is Phase.STOPPING:
            if now > self._deadline and self._children.alive:
                if any(process.ready for process in self._children.alive):
                    self._children.log_stacks("processes do not stop")
                self._children.kill(list(self._children.alive))
            return
        if now >= self._settle_at:
            self._settle_at = math.inf
            self._port.stop_handshakes()
        if now >= self._drain_at:
            self._drain()
        if now - self._last_tick > _PAUSE_S:
            for process in self._children.alive:
                process.heard = now
        self._last_tick = now
        self._beat(now)
        for role, index in self._restarts.take_due(now):
            if role != "frontend" or self._phase is Phase.SERVING:
                self._spawn(role, index)
        stuck = self._stuck(now)
        if stuck is not None:
            self._end(stuck, f"silent for {now - stuck.heard:.0f} s")
        ended = not self._children.of("frontend") or now > self._deadline
        if self._phase is Phase.DRAINING and ended:
            self._stop(0)

    def _beat(self, now: float) -> None:
        """Tell the frontends every second that this process runs."""
        if now < self._next_beat:
            return
        self._next_beat = now + _TICK_S
        self._inbox.repair()
        self._repair_directory()
        for process in self._children.of("frontend"):
            process.sender.send(self._launcher_beat(process.index))

    def _launcher_beat(self, frontend: int) -> LauncherBeat:
        return LauncherBeat(
            self._restarts.counts[ENGINE],
            self._restarts.counts["frontend"],
            sum(process.sender.dropped for process in self._children.alive),
            dropped_lines(),
            self._totals.values,
            self._totals.serial(frontend),
            self._num_stalls,
            int(sum(self._worker_losses.values)),
            self._is_leaving,
            self.gpus.states if self.gpus is not None else [],
        )

    def _repair_directory(self) -> None:
        """Make files in the runtime directory again that were removed. Says once what is
        wrong."""
        try:
            missing = self._janitor.runtime.repair(CONFIG_FILE, self._config.to_json())
        except OSError as error:
            if str(error) != self._dir_problem:
                logger.error(
                    "files in %s vanished and cannot be made: %s", self._config.runtime_dir, error
                )
            self._dir_problem = str(error)
            return
        if missing:
            logger.warning("%s vanished from %s: made again", missing, self._config.runtime_dir)
        self._dir_problem = ""

    def _stuck(self, now: float) -> Process | None:
        """A process that has been silent for too long: a running scheduler or frontend without
        heartbeat, or a starting process without progress. A process that waits for another one is
        not stuck."""
        patience = self._config.start_timeout_s
        scheduler = self._children.find("scheduler", 0)
        if scheduler is not None:
            limit = HEARTBEAT_LIMIT_S if scheduler.stage == _RUNNING else patience
            if now - scheduler.heard > limit:
                return scheduler
        workers = self._children.of("worker")
        if workers and now - max(process.heard for process in workers) > patience:
            for process in sorted(workers, key=lambda process: process.heard):
                if not process.ready:
                    return process
        for process in self._children.of("frontend"):
            since = max(process.heard, self._engine_ready_at)
            if now - since > (FRONTEND_LIMIT_S if process.ready else patience):
                return process
        return None

    def _leave(self) -> None:
        """Send new clients elsewhere: /readiness fails, and replies close their connections. Before
        the drain begins, no connection is made for a moment, so that each that was made has sent
        its request."""
        delay = self._config.drain_delay_s
        self._is_leaving = True
        self._next_beat = time.monotonic()
        self._settle_at = self._drain_at = self._next_beat + delay
        if delay:
            logger.info("stopping: new requests are accepted for %.0f s", delay)
            self._drain_at += _SETTLE_S

    def _drain(self) -> None:
        seconds = self._config.drain_timeout_s
        logger.info("stopping: running requests get %.0f s to finish", seconds)
        self._phase, self._drain_at = Phase.DRAINING, math.inf
        self._port.close_listener()
        self._deadline = time.monotonic() + seconds + _DRAIN_GRACE_S
        self._tell("frontend", Shutdown(seconds))
        self._tell("scheduler", Shutdown(seconds))

    def _stop(self, exit_code: int) -> None:
        if self._phase is Phase.STOPPING:
            return
        # A process that is still loading does not read its inbox, and killing it loses nothing.
        patience = 0.0 if self._phase is Phase.STARTING else _STOP_WAIT_S
        self._phase = Phase.STOPPING
        self._exit_code = exit_code
        self._deadline = time.monotonic() + patience
        for process in self._children.alive:
            process.sender.send(Shutdown(0.0))

    def _tell(self, role: str, message: Message) -> None:
        for process in self._children.of(role):
            process.sender.send(message)
