"""What can be known before anything starts: the machine, the model directory, the memory.

Imports no torch: a broken setup is reported in a second, with what to change.
"""

import importlib.util
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ..shared.config import ServeConfig, environment
from ..shared.errors import ConfigError, ModelError
from ..shared.model_spec import ModelSpec
from ..shared.resolve import Hardware
from ..workers.checkpoint import check_weights, main_tensor_shapes
from ..workers.host import available_memory, usable_cores

GIB = 1 << 30
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_QUERY = ("--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits")
_QUERY_TIMEOUT_S = 20.0


def detect_hardware() -> Hardware:
    """This machine, as far as this process may use it."""
    return Hardware(
        host_memory=available_memory(),
        num_cpus=usable_cores(),
        gpu_memory=_gpu_memory() if _torch_has_cuda() else (),
    )


def check_model(config: ServeConfig, spec: ModelSpec) -> None:
    """Raise ModelError unless weights (but for dummy ones), tokenizer and chat template are there
    and fit together."""
    directory = Path(config.model_dir)
    if config.load_format == "auto":
        check_weights(directory, spec)
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(f"{directory} has no tokenizer.json: copy it from the original checkpoint")
    tokenizer = _read_table(directory / "tokenizer_config.json")
    if (directory / "generation_config.json").exists():
        _read_table(directory / "generation_config.json")
    _check_template(config, tokenizer.get("chat_template"))


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}: copy it from the original checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path} is not a table of settings")
    return table


def _check_template(config: ServeConfig, built_in: object) -> None:
    """The file given, else the checkpoint's, else what tokenizer_config.json holds must parse."""
    import jinja2  # here: `glimmer --help` should be quick

    kind = ModelError if config.chat_template is None else ConfigError
    path = Path(config.chat_template or f"{config.model_dir}/chat_template.jinja")
    if built_in and config.chat_template is None and not path.exists():
        path = path.with_name("tokenizer_config.json")
    try:
        text = str(built_in) if path.suffix == ".json" else path.read_text()
        # transformers adds this tag to the language.
        text = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except FileNotFoundError:
        raise kind(f"{path} is missing: copy it or give --chat_template") from None
    except (OSError, UnicodeDecodeError) as error:
        raise kind(f"{path}: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise kind(f"{path}: line {error.lineno} of the chat template: {error}") from error
    if not text.strip():
        raise kind(f"{path}: the chat template is empty")


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
