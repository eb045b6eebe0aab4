"""What can be known before anything starts: the machine, the model directory, the memory.

Imports no torch: a broken setup is reported in a second, with what to change.
"""

import importlib.util
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

from ..shared.config import ServeConfig, environment
from ..shared.errors import ConfigError, ModelError
from ..shared.model_spec import ModelSpec
from ..shared.resolve import Hardware
from ..workers.checkpoint import check_weights, main_tensor_shapes

GIB = 1 << 30
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_QUERY = ("--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits")
_QUERY_TIMEOUT_S = 20.0


def detect_hardware() -> Hardware:
    """This machine, as far as this process may use it."""
    return Hardware(
        host_memory=_host_memory(),
        num_cpus=len(os.sched_getaffinity(0)),
        gpu_memory=_gpu_memory() if _torch_has_cuda() else (),
    )


def check_model(config: ServeConfig, spec: ModelSpec) -> None:
    """Raise ModelError unless weights (but for dummy ones), tokenizer and chat template are there
    and fit together."""
    directory = Path(config.model_dir)
    if config.load_format == "auto":
        check_weights(directory, spec)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise ModelError(f"{directory} has no {name}: copy it from the original checkpoint")
    if config.chat_template is None and not (directory / "chat_template.jinja").is_file():
        if "chat_template" in (directory / "tokenizer_config.json").read_text():
            return
        raise ModelError(f"{directory} has no chat_template.jinja: copy it or give --chat_template")


def check_memory(config: ServeConfig, spec: ModelSpec, hardware: Hardware) -> None:
    """Raise ConfigError if the weights alone cannot fit."""
    parameters = sum(math.prod(shape) for shape in main_tensor_shapes(spec).values())
    needed = parameters * _BYTES[config.data_type or ""] / GIB
    if config.device == "cpu":
        found = hardware.host_memory / GIB
        if needed > found:
            raise ConfigError(
                f"the weights need {needed:.1f} GiB in {config.data_type}, this machine has "
                f"{found:.1f} GiB available; free memory or use a larger machine"
            )
        return
    usable = min(hardware.gpu_memory[: config.tp]) * config.mem_fraction / GIB
    if needed / config.tp > usable:
        raise ConfigError(
            f"the weights need {needed / config.tp:.1f} GiB per GPU, --mem_fraction "
            f"{config.mem_fraction} of the free memory is {usable:.1f} GiB; free memory or raise "
            "--tp or --mem_fraction"
        )


def _host_memory() -> int:
    """Bytes available: the machine's, or what is left of this container's limit."""
    text = Path("/proc/meminfo").read_text()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    available = int(found.group(1)) << 10 if found else 1 << 62
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        available = min(available, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return available


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA; read from its files, importing it is slow."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    version = Path(found.origin).with_name("version.py")
    return version.is_file() and not re.search(
        r"^cuda\b.*=\s*None", version.read_text(), re.MULTILINE
    )


def _gpu_memory() -> tuple[int, ...]:
    """Free bytes of each GPU that CUDA_VISIBLE_DEVICES leaves, in the driver's order."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    try:
        done = subprocess.run(
            [tool, *_QUERY], capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    visible = environment().get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else [w.strip() for w in visible.split(",") if w.strip()]
    memory = []
    for line in done.stdout.splitlines():
        index, uuid, free = (word.strip() for word in line.split(","))
        if wanted is None or any(w == index or uuid.startswith(w) for w in wanted):
            memory.append(int(free) << 20)
    return tuple(memory)
