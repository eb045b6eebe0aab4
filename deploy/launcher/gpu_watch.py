"""Watches the GPUs of a server by NVML: `python -m glimmer.deploy.launcher.gpu_watch UUID ...`.

A process of its own, which the launcher reads from: a call into the driver of a lost GPU may never
return, and the launcher must be able to end the server then. It takes no time of a step. It writes
a line of JSON about once a second. It ends with its parent.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from ...shared.lifecycle import die_with_parent
from ...shared.messages import GpuState

_ROUND_MS = 1000  # for all GPUs together
# Errors of the hardware after which only a reset, a reboot or a repair helps.
FATAL_XIDS = frozenset({48, 62, 64, 79, 95, 119, 120, 136, 140, 143})
# Errors that a program causes; its process gets an error, too.
_APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68, 109})


class Report(msgspec.Struct):
    """One line: the state of each GPU, and why the server cannot go on; "" if it can."""

    gpus: list[GpuState]
    fault: str = ""


class GpuWatcher:
    """Looks at the GPUs with these UUIDs. `nvml` is the module `pynvml`, initialized. Raises its
    NVMLError if there is no such GPU."""

    def __init__(self, nvml: Any, uuids: Sequence[str]) -> None:
        self._nvml = nvml
        self._uuids = uuids
        self._handles = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        self._events = [self._listen(handle) for handle in self._handles]
        self._states = [GpuState(uuid) for uuid in uuids]
        self._fault = ""

    def look(self) -> Report:
        """Wait for events for a moment, read the counters. A fault is reported for good."""
        for number, (handle, events) in enumerate(zip(self._handles, self._events, strict=True)):
            try:
                self._take_event(number, events)
                self._read_ecc(number, handle)
            except self._nvml.NVMLError as error:
                self._on_error(number, error)
        return Report(self._states, self._fault)

    def _listen(self, handle: Any) -> Any:
        """The event set of one GPU; None if it has no events."""
        nvml = self._nvml
        wanted = nvml.nvmlEventTypeXidCriticalError
        try:
            if not nvml.nvmlDeviceGetSupportedEventTypes(handle) & wanted:
                return None
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(handle, wanted, events)
        except nvml.NVMLError_NotSupported:
            return None
        return events

    def _take_event(self, number: int, events: Any) -> None:
        if events is None:
            return
        try:
            event = self._nvml.nvmlEventSetWait_v2(events, _ROUND_MS // len(self._handles))
        except self._nvml.NVMLError_Timeout:
            return
        xid, state = int(event.eventData), self._states[number]
        changes: dict[str, Any] = {"last_xid": xid}
        kind = "fatal" if xid in FATAL_XIDS else "other"
        kind = "application" if xid in _APPLICATION_XIDS else kind
        changes[f"{kind}_xids"] = getattr(state, f"{kind}_xids") + 1
        self._change(number, **changes)
        if kind == "fatal":
            self._fail(number, f"Xid {xid}")

    def _read_ecc(self, number: int, handle: Any) -> None:
        """Errors since the driver was loaded."""
        nvml = self._nvml
        try:
            counts = [
                int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC))
                for kind in (
                    nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
                    nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                )
            ]
        except nvml.NVMLError_NotSupported:
            nvml.nvmlDeviceGetUUID(handle)  # fails if the GPU is lost
            return
        self._change(number, corrected_ecc=counts[0], uncorrected_ecc=counts[1])

    def _on_error(self, number: int, error: Exception) -> None:
        nvml = self._nvml
        lost = (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)
        if getattr(error, "value", None) in lost:
            self._fail(number, str(error))

    def _fail(self, number: int, reason: str) -> None:
        self._change(number, is_healthy=False)
        self._fault = self._fault or f"GPU {number} ({self._uuids[number]}): {reason}"

    def _change(self, number: int, **changes: Any) -> None:
        self._states[number] = msgspec.structs.replace(self._states[number], **changes)


def main(uuids: Sequence[str], parent_pid: int) -> int:
    """Watch until the parent has gone. Ends with 1 if NVML cannot be used."""
    import pynvml

    die_with_parent(parent_pid, None)
    try:
        pynvml.nvmlInit()
        watcher = GpuWatcher(pynvml, uuids)
    except pynvml.NVMLError as error:
        print(f"NVML cannot watch the GPUs: {error}", file=sys.stderr)
        return 1
    while True:
        os.write(1, msgspec.json.encode(watcher.look()) + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], int(sys.argv[1])))
