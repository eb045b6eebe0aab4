"""Decides which processes are started, told, killed and replaced, and when the server gives up.

A state machine that does not wait and has no clock of its own. `launcher.py` drives it with real
processes, and `tests/sim/` with virtual ones. `_lost` decides what a dead child means for the
others; `supervise.py` knows how a process is started and killed.
"""

import enum
import logging
import math
from collections.abc import Callable

from ...shared.config import ServeConfig
from ...shared.errors import ConfigError, StartError
from ...shared.log import dropped_lines
from ...shared.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Counts,
    GpuState,
    Heartbeat,
    Hello,
    LauncherBeat,
    Message,
    PeerLost,
    Progress,
    Ready,
    Reload,
    Reloaded,
    Shutdown,
    WorkerFailed,
)
from .listen import HttpPort
from .progress import StartDisplay
from .restarts import ENGINE, Restarts
from .service import ServiceManager
from .supervise import Children, Process, start_error
from .totals import Totals

logger = logging.getLogger(__name__)

TICK_S = 1.0
_STOP_WAIT_S = 5.0  # processes that got a Shutdown are killed after this time
_SETTLE_S = 0.3  # for the first request on a connection that was just made
_DRAIN_GRACE_S = 3.0  # frontends end the streams that outlast the drain within this time
_STOP_SLACK_S = 15.0  # more that systemd grants, for processes that die slowly
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


class Supervisor:
    """The state of one server: its processes, and the restarts that are due."""

    def __init__(
        self,
        config: ServeConfig,
        children: Children,
        port: HttpPort,
        display: StartDisplay,
        clock: Callable[[], float],
        on_serving: Callable[[], None],
    ) -> None:
        """`clock` gives monotonic seconds. `on_serving` is called once, when all are ready."""
        self._config = config
        self._children = children
        self._port = port
        self._display = display
        self._clock = clock
        self._on_serving = on_serving
        self.phase = Phase.STARTING
        self.exit_code = 0
        self.capacity = 0  # KV tokens, from the scheduler's Ready
        self._epoch = 0  # number of the engine's current incarnation
        self._engine_ready_at = math.inf  # infinite while the engine is not ready
        self._is_leaving = False  # SIGTERM came
        # When clients can make no new connections, and when requests are refused; then infinite.
        self._settle_at = self._drain_at = math.inf
        self._deadline = 0.0  # of the drain or stop
        self._restarts = Restarts(clock, config)
        self._stalled = False  # the stacks of this stall are in the log
        self._num_stalls = 0
        self.gpu_states: list[GpuState] = []  # as last heard of
        self._totals = Totals()  # of frontends
        self._worker_losses = Totals()  # log lines
        self._last_tick = self._next_beat = clock()
        self.service = ServiceManager()  # told how the server is; set before `start`
        self._steps = -1  # of the last heartbeat
        self._progress_at = clock()  # steps have advanced, or there was no work
        self._reloading: set[int] = set()  # frontends that are reading files again
        self._reload_problem = ""

    @property
    def has_ended(self) -> bool:
        """Whether all processes have ended, and none will be started."""
        return self.phase is Phase.STOPPING and not self._children.alive

    def start(self) -> None:
        """Start every process. Raises StartError if one cannot be started."""
        self._spawn("scheduler", 0)
        for rank in range(self._config.tp):
            self._spawn("worker", rank)
        for index in range(self._config.httpserver_workers):
            self._spawn("frontend", index)

    def wait_s(self, longest: float) -> float:
        """Seconds until something is due, at most `longest`."""
        next_phase = max(0.0, min(self._settle_at, self._drain_at) - self._clock())
        return self._restarts.wait_s(min(longest, next_phase))

    # --- events -----------------------------------------------------------------------------

    def reap(self) -> None:
        """Handle all children that ended. The scheduler comes first, because its loss includes
        that of the workers. Killed processes come next: others may have failed because of them."""
        ended = self._children.reap()
        ended.sort(key=lambda e: (e[0].role != "scheduler", e[0].returncode >= 0))
        for process, reason in ended:
            self._lost(process, reason)

    def handle(self, message: AnyMessage) -> None:
        """Handle a message from the launcher's inbox. Raises ConfigError if, during the start, it
        is from a process of another version or configuration."""
        match message:
            case Hello(role, index, pid, config_hash, protocol):
                self._check_hello(role, index, config_hash, protocol)
                process = self._hear(role, index)
                if process is not None and process.pid == pid:
                    process.greeted = True
            case Progress(role, index, stage, done, total):
                self._hear(role, index, stage, done, total)
            case Ready():
                self._on_peer_ready(message)
            case Heartbeat(stall=stall):
                self._hear("scheduler", 0, _RUNNING)
                self._note_progress(message)
                if stall and not self._stalled:
                    self._num_stalls += 1
                    logger.warning("%s", stall)
                    self._children.log_stacks("a step does not end")
                self._stalled = bool(stall)
            case Reloaded(index, problem):
                self._end_reload(index, problem)
            case Counts(role="worker"):
                self._worker_losses.add(message)
            case Counts(index=index):
                self._totals.add(message)
                if (process := self._hear("frontend", index)) is not None:
                    process.sender.send(self._launcher_beat(index))
            case WorkerFailed(epoch, rank, reason):
                process = self._children.find("worker", rank)
                if epoch == self._epoch and process is not None:
                    self._children.let_exit(process)
                    self.reap()
                    self._end(process, reason)  # nothing if it has ended
            case _:
                logger.warning("unexpected %s in the launcher's inbox", type(message).__name__)

    def _hear(
        self, role: str, index: int, stage: str = "", done: int = 0, total: int = 0
    ) -> Process | None:
        process = self._children.find(role, index)
        if process is None:
            return None
        process.heard = self._clock()
        if stage and (total or stage != process.stage):
            process.stage = stage
            if self.phase is Phase.STARTING:
                self._display.update(process.name, stage, done, total)
                patience = self._config.start_timeout_s
                self.service.loading(process.name, stage, done, total, patience)
        return process

    def _note_progress(self, heartbeat: Heartbeat) -> None:
        busy = heartbeat.num_running + heartbeat.num_waiting + heartbeat.num_paused > 0
        if heartbeat.steps != self._steps or not (busy and heartbeat.worker_ready):
            self._steps, self._progress_at = heartbeat.steps, self._clock()

    def reload(self) -> None:
        """Let all frontends read the files of keys and certificates again."""
        self._reload_problem = ""
        self.service.reloading()
        if self._config.can_reload:
            self._reloading = {p.index for p in self._children.of("frontend") if p.ready}
            self.tell("frontend", Reload())
        if not self._reloading:
            self.service.ready()

    def _end_reload(self, index: int, problem: str = "") -> None:
        """A frontend has read its files, or has ended: its successor reads them as they are."""
        self._reload_problem = problem or self._reload_problem
        if index in self._reloading:
            self._reloading.discard(index)
            if not self._reloading and self.phase is Phase.SERVING:
                self.service.ready(self._reload_problem)

    def _check_hello(self, role: str, index: int, config_hash: str, protocol: int) -> None:
        if protocol == PROTOCOL_VERSION and config_hash == self._config.config_hash():
            return
        problem = ConfigError(
            f"{role} {index} runs another version or configuration (protocol {protocol}, config "
            f"{config_hash}; here {PROTOCOL_VERSION}, {self._config.config_hash()}); was the "
            "package changed while the server ran?"
        )
        if self.phase is Phase.STARTING:
            raise problem
        self.give_up(str(problem), problem.exit_code)

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
            self.capacity = ready.num_pages * self._config.page_size
            self._engine_ready_at = self._progress_at = self._clock()
            if self.phase is Phase.SERVING:
                logger.info("the engine is ready again (epoch %d)", ready.epoch)
        frontends = self._children.of("frontend")
        if self.phase is Phase.STARTING and all(process.ready for process in frontends):
            self.phase = Phase.SERVING
            self._on_serving()

    # --- losses -----------------------------------------------------------------------------

    def _end(self, process: Process, reason: str) -> None:
        """Kill a child that hangs or cannot go on, unless it already ended."""
        if process in self._children.alive:
            self._children.log_stacks(f"{process.name} is killed ({reason.partition(';')[0]})")
            self._children.kill([process])
            self._lost(process, reason)

    def _lost(self, process: Process, reason: str) -> None:
        """A child ended. That ends a start; later, the child is restarted unless it was to end."""
        if self.phase is Phase.STOPPING:
            return
        code = process.returncode
        if self.phase is Phase.STARTING:
            raise start_error(code, f"{process.name} failed while {process.stage}: {reason}")
        if self.phase is Phase.DRAINING and process.role == "frontend" and code == 0:
            return
        logger.error("lost %s (pid %d): %s", process.name, process.pid, reason)
        if process.role == "frontend":
            self.tell("scheduler", PeerLost("frontend", process.index, reason))
            self._end_reload(process.index)
            if self.phase is Phase.SERVING:
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
            self.tell("scheduler", PeerLost("worker", process.index, reason, process.epoch))
            self._restart(process, reason, workers)
        else:
            self.tell("frontend", PeerLost("scheduler", 0, reason))
            if self.phase is Phase.SERVING:
                self._restart(process, reason, [("scheduler", 0), *workers])

    def _restart(self, lost: Process, reason: str, starts: list[tuple[str, int]]) -> None:
        """Schedule these (role, index) to start, or stop if that has not helped before."""
        problem = self._restarts.lost(lost, starts)
        if problem:
            code = start_error(lost.returncode, "").exit_code
            self.give_up(f"{problem}: {reason}", code)

    def give_up(self, reason: str, exit_code: int) -> None:
        """End the server with an error: a restart would not help."""
        logger.error("giving up: %s", reason)
        self.tell("frontend", PeerLost("scheduler", 0, reason))
        self.stop(exit_code)

    # --- actions ----------------------------------------------------------------------------

    def _spawn(self, role: str, index: int) -> None:
        try:
            process = self._children.spawn(role, index, self._epoch)
        except OSError as error:  # too many files or processes, no memory
            if self.phase is Phase.STARTING:
                raise StartError(f"cannot start {role} {index}: {error}") from error
            logger.error("cannot start %s %d: %s; trying again", role, index, error)
            self._restarts.schedule(f"{role} {index}", [(role, index)])
            return
        if self.phase is Phase.STARTING:
            self._display.update(process.name, process.stage)
        else:
            logger.info("started %s again (pid %d)", process.name, process.pid)

    def tick(self) -> None:
        """Everything that depends on time: due restarts, silent processes, the deadline."""
        now = self._clock()
        if self.phase is Phase.STOPPING:
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
            if role != "frontend" or self.phase is Phase.SERVING:
                self._spawn(role, index)
        stuck = self._stuck(now)
        if stuck is not None:
            self._end(stuck, f"silent for {now - stuck.heard:.0f} s")
        ended = not self._children.of("frontend") or now > self._deadline
        if self.phase is Phase.DRAINING and ended:
            self.stop(0)

    def _beat(self, now: float) -> None:
        """Tell the frontends every second that this process runs."""
        if now < self._next_beat:
            return
        self._next_beat = now + TICK_S
        if self.phase is not Phase.STARTING and self._advances(now):
            self.service.alive()
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
            self.gpu_states,
        )

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
            if self._engine_ready_at == math.inf:  # all workers are, but it does not say so
                return scheduler
        for process in self._children.of("frontend"):
            since = process.heard if process.ready else process.started
            since = max(since, self._engine_ready_at)
            if now - since > (FRONTEND_LIMIT_S if process.ready else patience):
                return process
        return None

    def _advances(self, now: float) -> bool:
        """Whether systemd's watchdog may be fed. Processes that are silent and steps that hang are
        ended here. If one stays for much longer than allowed, the launcher itself is at fault."""
        grace = self.service.watchdog_s / 2
        limit = self._progress_at + self._config.step_timeout_s + grace
        has_steps = self._engine_ready_at == math.inf or now <= limit
        return has_steps and self._stuck(now - grace) is None

    def leave(self) -> None:
        """Send new clients elsewhere: /readiness fails, and replies close their connections. Before
        the drain begins, no connection is made for a moment, so that each that was made has sent
        its request."""
        if self._is_leaving:
            return
        delay = self._config.drain_delay_s
        self._is_leaving = True
        self._next_beat = self._clock()
        seconds = delay + self._config.drain_timeout_s
        patience = seconds + _SETTLE_S + _DRAIN_GRACE_S + _STOP_WAIT_S + _STOP_SLACK_S
        self.service.stopping(f"draining for up to {seconds:.0f} s", patience)
        self._settle_at = self._drain_at = self._next_beat + delay
        if delay:
            logger.info("stopping: new requests are accepted for %.0f s", delay)
            self._drain_at += _SETTLE_S

    def _drain(self) -> None:
        seconds = self._config.drain_timeout_s
        logger.info("stopping: running requests get %.0f s to finish", seconds)
        self.phase, self._drain_at = Phase.DRAINING, math.inf
        self._port.close_listener()
        self._deadline = self._clock() + seconds + _DRAIN_GRACE_S
        self.tell("frontend", Shutdown(seconds))
        self.tell("scheduler", Shutdown(seconds))

    def stop(self, exit_code: int) -> None:
        """Stop all processes."""
        if self.phase is Phase.STOPPING:
            return
        # A process that is still loading does not read its inbox, and killing it loses nothing.
        patience = 0.0 if self.phase is Phase.STARTING else _STOP_WAIT_S
        self.service.stopping("stopping", patience + _STOP_SLACK_S)
        self.phase = Phase.STOPPING
        self.exit_code = exit_code
        self._deadline = self._clock() + patience
        for process in self._children.alive:
            process.sender.send(Shutdown(0.0))

    def tell(self, role: str, message: Message) -> None:
        """Send a message to all live processes of a role."""
        for process in self._children.of(role):
            process.sender.send(message)
