"""`glimmer check`: reports what would stop a server from starting, without starting it."""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from ..shared.config import ServeConfig
from ..shared.errors import ConfigError, ModelError, StartError
from ..shared.model_spec import ModelSpec, load_model_spec
from ..shared.resolve import resolve
from .launcher.checksums import verify_checksums
from .launcher.gpus import check_gpus
from .launcher.launch import allow_files
from .launcher.listen import bind_port
from .launcher.preflight import (
    check_access,
    check_extras,
    check_memory,
    check_model,
    detect_hardware,
)
from .launcher.runtime_dir import claim_runtime_dir, default_parent


def check(
    config: ServeConfig,
    refused: Sequence[str] = (),
    with_reference: bool = False,
    with_golden: bool = False,
) -> int:
    """Print one line per check. Returns the exit code of `glimmer serve` for the first problem,
    or 0. `refused` describes flags that would stop it. With `with_reference`, tokenizer and
    template are compared with those of transformers. `with_golden` stores a reference for the
    self-test, if all else is right."""
    hardware = detect_hardware()
    codes: list[int] = []

    def aspect(name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except StartError as error:
            codes.append(error.exit_code)
            print(f"BAD {name}: {error}")
        else:
            print(f"ok  {name}")

    gpus = f"no GPU ({hardware.no_gpu_reason})"
    if hardware.gpu_memory:
        each = zip(hardware.gpu_memory, hardware.gpu_capabilities, strict=True)
        gpus = "GPUs " + ", ".join(f"{free >> 30} GiB free (sm {sm})" for free, sm in each)
    print(f"machine: {hardware.num_cpus} CPUs, {hardware.host_memory >> 30} GiB free, {gpus}")
    for problem in refused:
        codes.append(ConfigError.exit_code)
        print(f"BAD flag: {problem}")
    try:
        spec = load_model_spec(Path(config.model_dir))
    except StartError as error:
        print(f"BAD model directory: {error}")
        codes.append(error.exit_code)
    else:
        settled: list[ServeConfig] = []
        aspect("configuration", lambda: settled.append(resolve(config, spec, hardware)))
        aspect("model directory", lambda: check_model(settled[0] if settled else config, spec))
        aspect("tokenizer and defaults", lambda: _load_tokenizer(config, spec))
        if config.verify_checksums:
            aspect("checksums", lambda: verify_checksums(config))
        if settled:
            aspect("open files", lambda: allow_files(settled[0]))
            if settled[0].device == "cuda":
                aspect("GPUs and backends", lambda: check_gpus(settled[0], hardware))
            aspect("memory", lambda: check_memory(settled[0], spec, hardware))
        if with_reference:
            aspect("tokenizer and template, as in transformers", lambda: _compare(config, spec))
    aspect("installed extras", lambda: check_extras(config))
    aspect("API keys and certificate", lambda: check_access(config))
    aspect(f"port {config.port}", lambda: bind_port(config.host, config.port).close())
    if config.metrics_port is not None:
        number = config.metrics_port
        name = "--metrics_port"
        aspect(f"port {number}", lambda: bind_port(config.host, number, name).close())
    aspect("runtime directory", lambda: _try_runtime_dir(config))
    if with_golden and not codes:
        aspect(f"reference in {config.model_dir}", lambda: _write_golden(settled[0], spec))
    return codes[0] if codes else 0


def _load_tokenizer(config: ServeConfig, spec: ModelSpec) -> None:
    """As a frontend does."""
    from ..frontend.engine.params import load_defaults
    from ..frontend.text.tokenizer import Tokenizer

    directory = Path(config.model_dir)
    try:
        with closing(Tokenizer(directory, spec.vocab_size, config.chat_template)) as tokenizer:
            tokenizer.try_template()
        load_defaults(directory)
    except (OSError, ValueError) as error:
        raise ModelError(str(error)) from error


def _compare(config: ServeConfig, spec: ModelSpec) -> None:
    from .reference import compare_with_transformers

    compare_with_transformers(Path(config.model_dir), spec.vocab_size, config.chat_template)


def _write_golden(config: ServeConfig, spec: ModelSpec) -> None:
    from .golden import write_golden

    write_golden(config, spec)


def _try_runtime_dir(config: ServeConfig) -> None:
    path = None if config.runtime_dir is None else Path(config.runtime_dir)
    claim_runtime_dir(path, default_parent()).remove()
