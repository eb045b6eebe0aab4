"""Runs one server's processes: the loop around `supervisor.py`, which decides what is done.

The launcher waits for messages in its inbox, for the end of a child, and for signals. It also keeps
the runtime directory whole and shows the start.
"""

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable

from ...shared.config import ServeConfig
from ...shared.errors import GpuError
from ...shared.lifecycle import CONFIG_FILE
from ...shared.log import write_aside
from ...shared.transport import Receiver, launcher_address
from .gpu_health import GpuHealth
from .listen import HttpPort
from .progress import StartDisplay
from .service import ServiceManager
from .signals import can_open_terminal, handlers
from .supervise import Children, JanitorKeeper
from .supervisor import TICK_S, Phase, Supervisor

logger = logging.getLogger(__name__)

_SLOW_TICK_S = 0.1  # on kernels without pidfds, where the end of a child does not end a wait


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
        service: ServiceManager,
    ) -> None:
        """`started` is the monotonic time at which the command began. `on_ready` is called once,
        with this launcher and the server's URL."""
        self._config = config
        self._children = children
        self._janitor = janitor
        self._port = port
        self._started = started
        self._on_ready = on_ready
        self._service = service
        self._stop_requests = 0
        self._is_reload_asked = False
        self._has_terminal = can_open_terminal()
        self.gpus: GpuHealth | None = None  # None: they are not watched; set before `run`
        self._dir_problem = ""
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    def run(self) -> int:
        """Start, serve, stop. Returns the exit code. Raises StartError if the start fails."""
        self._display = StartDisplay(as_log=self._config.log_format != "text")
        self._supervisor = Supervisor(
            self._config,
            self._children,
            self._port,
            self._display,
            time.monotonic,
            self._announce,
        )
        self._supervisor.service = self._service
        self._next_repair = self._started
        with (
            Receiver.bind(launcher_address(str(self._children.runtime_dir))) as inbox,
            handlers(self.stop, self._hang_up, self._wake_write.fileno()),
        ):
            try:
                self._supervisor.start()
                while not self._supervisor.has_ended:
                    self._wait(inbox)
            finally:
                self._display.close()
                self._children.close()
                self._wake_read.close()
                self._wake_write.close()
        return self._supervisor.exit_code

    def stop(self) -> None:
        """Drain and stop, as SIGTERM does. A second call stops at once. Thread-safe."""
        self._stop_requests += 1
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    def _hang_up(self) -> None:
        """SIGHUP: read key and certificate files again. Stop if the signal came because the
        terminal was closed; also if there are no files, unless it came from systemd's reload."""
        is_closed = self._has_terminal and not can_open_terminal()
        if (self._config.can_reload or self._service.is_there) and not is_closed:
            self._is_reload_asked = True
        else:
            self.stop()

    # --- events -----------------------------------------------------------------------------

    def _wait(self, inbox: Receiver) -> None:
        """Wait for the next event, then handle everything that has happened."""
        sentinels = [process.sentinel for process in self._children.alive]
        fds = (*sentinels, self._janitor.sentinel, self.gpus.fileno() if self.gpus else None)
        watched = [fd for fd in fds if fd is not None]
        tick = _SLOW_TICK_S if None in sentinels else TICK_S
        inbox.wait([self._wake_read.fileno(), *watched], self._supervisor.wait_s(tick))
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(64)
        self._supervisor.reap()
        for message in inbox.receive(0):
            self._supervisor.handle(message)
        self._janitor.check()
        self._check_gpus()
        self._follow_requests()
        self._supervisor.tick()
        if time.monotonic() >= self._next_repair:
            self._next_repair = time.monotonic() + TICK_S
            inbox.repair()
            self._repair_directory()

    def _check_gpus(self) -> None:
        """End the server if a GPU is lost: another start on it would not help."""
        supervisor = self._supervisor
        if self.gpus is None or supervisor.phase is Phase.STOPPING:
            return
        self.gpus.read()
        supervisor.gpu_states = self.gpus.states
        if self.gpus.fault and supervisor.phase is Phase.STARTING:
            raise GpuError(self.gpus.fault)
        if self.gpus.fault:
            supervisor.give_up(self.gpus.fault, GpuError.exit_code)

    def _follow_requests(self) -> None:
        supervisor = self._supervisor
        if self._is_reload_asked:
            self._is_reload_asked = False
            supervisor.reload()
        if self._stop_requests == 0:
            return
        if self._stop_requests > 1 or supervisor.phase is Phase.STARTING:
            supervisor.stop(0)
        elif supervisor.phase is Phase.SERVING:
            supervisor.leave()

    def _announce(self) -> None:
        self._display.close()
        logger.info("worker 0: %s", self._display.spent("worker 0"))
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._config.host, self._config.host)
        name = f"[{host}]" if ":" in host else host
        scheme = "http" if self._config.ssl_certfile is None else "https"
        url = f"{scheme}://{name}:{self._config.port}"
        if self._config.metrics_port is not None:
            logger.info("probes and metrics: http://%s:%d", name, self._config.metrics_port)
        took_s = time.monotonic() - self._started
        line = (
            f"Glimmer is ready: {url}  model {self._config.model_name}  KV cache "
            f"{self._supervisor.capacity:,} tokens  started in {took_s:.1f} s\n"
        )
        write_aside(sys.stdout.fileno(), line)
        self._service.ready(line.partition(": ")[2].strip())
        if self._on_ready is not None:
            self._on_ready(self, url)

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
