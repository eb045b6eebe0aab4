"""Finds the GPUs of this machine with nvidia-smi and checks that they and the packages suffice.

Does not import torch, which takes seconds. Workers import it and find any other problem.
"""

import importlib.util
import logging
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...shared.config import ServeConfig, environment
from ...shared.errors import ConfigError
from ...shared.resolve import Hardware

_QUERY = "index,uuid,memory.free,compute_cap,driver_version,name"
_QUERY_TIMEOUT_S = 20.0
_LEAST_DRIVERS = {11: 450, 12: 525, 13: 580}  # CUDA of torch -> oldest driver that runs it
_LEAST_CAPABILITY = 8.0  # bfloat16 and Triton
_TUNED_CAPABILITY = 9.0  # H100, H200
_HOPPER = 9  # major compute capability; FA3 is compiled only for it
# Backend -> (modules, one of which must be installed; the package to install).
_LIBRARIES = {
    "fa3": (("flash_attn_interface", "fa3_fwd_interface"), "fa3-fwd"),
    "flashinfer": (("flashinfer",), "flashinfer-python"),
    "triton": (("triton",), "triton"),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Gpu:
    index: str
    uuid: str
    free_bytes: int
    capability: float
    driver: str


def find_gpus() -> tuple[tuple[int, ...], tuple[float, ...], str]:
    """(free bytes, compute capabilities, "") of the GPUs that torch can use, in the driver's
    order. Without any: two empty tuples and the reason, logged if there is a driver."""
    try:
        gpus = _usable_gpus()
    except LookupError as error:
        reason = str(error)
        if shutil.which("nvidia-smi") and environment().get("CUDA_VISIBLE_DEVICES") != "":
            logger.warning("GPUs cannot be used: %s", reason)
        return (), (), reason
    return tuple(gpu.free_bytes for gpu in gpus), tuple(gpu.capability for gpu in gpus), ""


def check_gpus(config: ServeConfig, hardware: Hardware) -> None:
    """Raise ConfigError if the GPUs or the installed packages do not support a settled config.
    Warn about GPUs for which no kernel was tuned."""
    if config.device != "cuda":
        return
    for number, capability in enumerate(hardware.gpu_capabilities[: config.tp]):
        gpu = f"GPU {number} has compute capability {capability}"
        if capability < _LEAST_CAPABILITY:
            raise ConfigError(
                f"{gpu}, the kernels need {_LEAST_CAPABILITY} (A100) or newer: use another GPU, "
                "or --device cpu"
            )
        if capability < _TUNED_CAPABILITY:
            logger.warning("%s: slower, kernels are tuned for %s", gpu, _TUNED_CAPABILITY)
        for flag, backend in _asked_backends(config):
            if backend == "fa3" and int(capability) != _HOPPER:
                raise ConfigError(
                    f"--{flag} fa3 needs compute capability 9.0 (H100, H200), {gpu}; "
                    f"use --{flag} auto"
                )
    for flag, backend in _asked_backends(config):
        modules, package = _LIBRARIES.get(backend, ((), ""))
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            raise ConfigError(
                f"--{flag} {backend} needs {package}, which is not installed: "
                f"pip install {package}, or use --{flag} auto"
            )


def usable_uuids() -> list[str]:
    """UUIDs of the GPUs that torch can use, in the order of the ranks. Empty if there are none."""
    try:
        return [gpu.uuid for gpu in _usable_gpus()]
    except LookupError:
        return []


def _asked_backends(config: ServeConfig) -> list[tuple[str, str]]:
    decode = config.llm_decode_att_backend[0]
    return [
        ("llm_prefill_att_backend", config.llm_prefill_att_backend[0]),
        # FA3 has no decode kernel; LightLLM's scripts ask for it, so it means auto here.
        ("llm_decode_att_backend", "auto" if decode == "fa3" else decode),
    ]


def _usable_gpus() -> list[_Gpu]:
    """Raises LookupError with the reason if there is none."""
    gpus = _query()
    cuda = _torch_cuda()
    if cuda is None:
        raise LookupError("the installed torch is built without CUDA: install its CUDA build")
    least = _LEAST_DRIVERS.get(cuda)
    driver = gpus[0].driver
    if least is not None and driver.split(".")[0].isdigit() and int(driver.split(".")[0]) < least:
        raise LookupError(
            f"driver {driver} is too old for CUDA {cuda} of the installed torch, which needs "
            f"{least} or newer: update the driver or install a torch for an older CUDA"
        )
    visible = environment().get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    names = [word.strip() for word in visible.split(",") if word.strip()]
    usable = [g for g in gpus if any(w == g.index or g.uuid.startswith(w) for w in names)]
    if not usable:
        raise LookupError(f"CUDA_VISIBLE_DEVICES={visible} hides all {len(gpus)} GPUs: unset it")
    return usable


def _torch_cuda() -> int | None:
    """Major version of CUDA that the installed torch was built for, read from its files."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    text = file.read_text() if file.is_file() else ""
    version = re.search(r"^cuda\b[^=]*=\s*'(\d+)", text, re.MULTILINE)
    return int(version[1]) if version else None


def _query() -> list[_Gpu]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise LookupError(
            "nvidia-smi was not found: install the NVIDIA driver, or give the container its GPUs"
        )
    command = [tool, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True
        )
    except subprocess.CalledProcessError as error:
        words = f"{error.stdout} {error.stderr}".split()
        raise LookupError(f"nvidia-smi failed: {' '.join(words) or error}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise LookupError(f"nvidia-smi failed: {error}") from error
    gpus = [gpu for line in done.stdout.splitlines() if (gpu := _parse(line)) is not None]
    if not gpus:
        raise LookupError(f"nvidia-smi lists no GPU: {' '.join(done.stdout.split()) or 'nothing'}")
    return gpus


def _parse(line: str) -> _Gpu | None:
    try:
        index, uuid, free, capability, driver, _ = (word.strip() for word in line.split(",", 5))
        return _Gpu(index, uuid, int(free) << 20, float(capability), driver)
    except ValueError:  # a lost GPU has "[N/A]" in some columns
        return None
