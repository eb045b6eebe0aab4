"""The launcher's side of `gpu_watch.py`: starts that process and reads what it reports."""

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import time

import msgspec

from ...shared.config import ServeConfig
from ...shared.log import output_fd
from ...shared.messages import GpuState
from .gpu_watch import Report
from .gpus import usable_uuids

_SILENCE_S = 60.0  # a driver call that takes longer hangs
_EXIT_WAIT_S = 1.0
logger = logging.getLogger(__name__)


class GpuHealth:
    """The GPUs of a server as last reported. Use from the main thread."""

    def __init__(self, uuids: list[str]) -> None:
        command = [sys.executable, "-P", "-m", f"{__package__}.gpu_watch", str(os.getpid())]
        self._popen = subprocess.Popen(
            [*command, *uuids],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output_fd(),
            start_new_session=True,
        )
        assert self._popen.stdout is not None
        self._pipe = self._popen.stdout.fileno()
        os.set_blocking(self._pipe, False)
        self._rest = b""
        self._heard = time.monotonic()
        self._is_silent = False
        self._has_ended = False
        self.states: list[GpuState] = []
        self.fault = ""  # why the server cannot go on

    def fileno(self) -> int | None:
        """Readable when there is a report; None once there will be no more."""
        return None if self._has_ended else self._pipe

    def read(self) -> None:
        """Take in the reports that have come."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._pipe, 1 << 16) if not self._has_ended else b""
            if not data and not self._has_ended:
                self._has_ended = True
                logger.warning("the health of the GPUs is no longer watched: the watcher has ended")
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            report = msgspec.json.decode(lines[-1], type=Report)
            self.states, self.fault = report.gpus, report.fault
            self._heard, self._is_silent = time.monotonic(), False
        elif time.monotonic() - self._heard > _SILENCE_S and not self._is_silent:
            self._is_silent = True
            logger.error("NVML has not answered for %.0f s: the driver hangs", _SILENCE_S)

    def close(self) -> None:
        """End the process. One that hangs in the driver is left to the kernel."""
        self._popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(_EXIT_WAIT_S)
        assert self._popen.stdout is not None
        self._popen.stdout.close()


def watch_gpus(config: ServeConfig) -> GpuHealth | None:
    """For a settled config. None on CPUs, and without NVML's Python package."""
    if config.device != "cuda":
        return None
    if importlib.util.find_spec("pynvml") is None:
        logger.info("the health of the GPUs is not watched: pip install nvidia-ml-py")
        return None
    return GpuHealth(usable_uuids()[: config.tp])
