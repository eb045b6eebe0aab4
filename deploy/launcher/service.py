"""Tells systemd how this server is: loading, ready, alive, reloading, stopping.

Each message is one datagram to the socket that NOTIFY_SOCKET names (sd_notify(3)). Without that
variable nothing is sent. A message never blocks and never fails.
"""

import contextlib
import socket
import time

from ...shared.config import take_service_manager

_REPEAT_S = 1.0  # least time between two messages about the same stage of a start


class ServiceManager:
    """The link to systemd. `watchdog_s` is the longest time between two `alive`; 0: no watchdog."""

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self.watchdog_s = watchdog_s if address else 0.0
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._stage, self._told_at = "", 0.0
        self._ready_status = ""

    @classmethod
    def of_environment(cls) -> "ServiceManager":
        """The one that started this process, if any. Child processes are not told of it."""
        return cls(*take_service_manager())

    @property
    def is_there(self) -> bool:
        """Whether anybody listens."""
        return self._address != ""

    def loading(
        self, process: str, stage: str, done: int, total: int, patience_s: float = 0.0
    ) -> None:
        """A start makes progress: it gets `patience_s` more from now on."""
        now = time.monotonic()
        if stage == self._stage and now - self._told_at < _REPEAT_S:
            return
        self._stage, self._told_at = stage, now
        percent = f" {100 * done // total}%" if total else ""
        self._tell(STATUS=f"{process}: {stage}{percent}", EXTEND_TIMEOUT_USEC=_usec(patience_s))

    def ready(self, status: str = "") -> None:
        """The server answers: the start, or a reload, is over. "": the status that was told when
        the start was over."""
        self._ready_status = self._ready_status or status
        self._tell(READY="1", STATUS=status or self._ready_status)

    def alive(self) -> None:
        """Feed the watchdog."""
        self._tell(WATCHDOG="1")

    def reloading(self) -> None:
        """Files are being read again; `ready` ends that."""
        self._tell(RELOADING="1", MONOTONIC_USEC=_usec(time.monotonic()))

    def stopping(self, status: str, seconds: float) -> None:
        """The server stops within this time."""
        self._tell(STOPPING="1", STATUS=status, EXTEND_TIMEOUT_USEC=_usec(seconds))

    def failed(self, reason: str) -> None:
        """Why the server cannot start; `systemctl status` shows it."""
        self._tell(STATUS=reason)

    def _tell(self, **fields: str) -> None:
        if not self.is_there:
            return
        lines = (f"{name}={value}".replace("\n", " ") for name, value in fields.items())
        message = "\n".join(lines).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.setblocking(False)
            with contextlib.suppress(OSError):  # systemd is busy, or has gone
                link.sendto(message, self._address)


def _usec(seconds: float) -> str:
    return str(int(seconds * 1e6))
