"""NVML without a GPU. The file that the variable FAKE_NVML names says what happens at each look at
a GPU, one word a line: "xid=79", "lost", "ecc=3", "no-ecc", "hang". Without a line: nothing."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

NVML_VOLATILE_ECC, NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED = 0, 15, 16
NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
nvmlEventTypeXidCriticalError = 8  # noqa: N816 - NVML's names
supported_events = 8
script: list[str] = []
uncorrected = 0


class NVMLError(Exception):
    value = 999


class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
    value = 3


class NVMLError_Timeout(NVMLError):  # noqa: N801, N818
    value = 10


class NVMLError_GpuIsLost(NVMLError):  # noqa: N801, N818
    value = NVML_ERROR_GPU_IS_LOST


class NVMLError_ResetRequired(NVMLError):  # noqa: N801, N818
    value = NVML_ERROR_RESET_REQUIRED


def nvmlInit() -> None:  # noqa: N802
    pass


def nvmlDeviceGetHandleByUUID(uuid: str) -> str:  # noqa: N802
    if not uuid.startswith("GPU-"):
        raise NVMLError("not found")
    return uuid


def nvmlDeviceGetUUID(handle: str) -> str:  # noqa: N802
    return handle


def nvmlDeviceGetSupportedEventTypes(handle: str) -> int:  # noqa: N802
    return supported_events


def nvmlEventSetCreate() -> str:  # noqa: N802
    return "events"


def nvmlDeviceRegisterEvents(handle: str, kinds: int, events: str) -> None:  # noqa: N802
    pass


def nvmlEventSetWait_v2(events: str, timeout_ms: int) -> SimpleNamespace:  # noqa: N802
    global uncorrected
    if (path := os.environ.get("FAKE_NVML")) and Path(path).exists():
        time.sleep(0.05)
        script.extend(Path(path).read_text().split())
        Path(path).unlink()
    word = script.pop(0) if script else ""
    if word.startswith("xid="):
        return SimpleNamespace(eventData=int(word[4:]))
    if word == "lost":
        raise NVMLError_GpuIsLost("GPU is lost")
    if word == "reset":
        raise NVMLError_ResetRequired("reset required")
    if word.startswith("ecc="):
        uncorrected = int(word[4:])
    raise NVMLError_Timeout


def nvmlDeviceGetTotalEccErrors(handle: str, kind: int, counter: int) -> int:  # noqa: N802
    if uncorrected < 0:
        raise NVMLError_NotSupported
    return uncorrected * kind
