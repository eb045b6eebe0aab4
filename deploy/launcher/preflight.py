"""Checks of the machine, the model directory and the memory before anything starts.

Does not import torch, so a broken setup is reported within a second, with the setting to change.
"""

import importlib.util
import ipaddress
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from ...frontend.access.keys import load_keys
from ...frontend.access.tls import load_certificate
from ...shared.config import ServeConfig
from ...shared.errors import ConfigError, ModelError
from ...shared.model_spec import ModelSpec, num_kv_layers
from ...shared.resolve import Hardware
from ...workers.memory.host import available_memory, usable_cores
from ...workers.weights.checkpoint import (
    check_draft,
    check_weights,
    main_tensor_shapes,
    nextn_tensor_shapes,
)
from .gpus import find_gpus

logger = logging.getLogger(__name__)
GIB = 1 << 30
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def detect_hardware() -> Hardware:
    """The part of this machine that this process may use."""
    return Hardware(available_memory(), usable_cores(), *find_gpus())


def check_extras(config: ServeConfig) -> None:
    """Raise ConfigError if a flag needs a package that is not installed."""
    if config.otlp_traces_endpoint is None:
        return
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        raise ConfigError(
            "--otlp_traces_endpoint needs OpenTelemetry, which is not installed: "
            "pip install 'glimmer-serve[otel]'"
        )
    if not re.match(r"https?://[^/]", config.otlp_traces_endpoint):
        raise ConfigError(
            f"--otlp_traces_endpoint {config.otlp_traces_endpoint}: give a URL such as "
            "http://127.0.0.1:4318/v1/traces"
        )


def check_access(config: ServeConfig) -> None:
    """Raise ConfigError if the files of keys or certificates cannot be used. Warn if strangers can
    use the server, or read the keys of others."""
    load_keys(config)
    if config.ssl_certfile is not None:
        load_certificate(config)
    if _is_loopback(config.host):
        return
    if not config.has_keys:
        logger.warning(
            "--host %s: EVERYBODY WHO REACHES PORT %d CAN USE THIS SERVER. Set --api_key_file or "
            "GLIMMER_API_KEY, or let only a proxy reach it",
            config.host,
            config.port,
        )
    elif config.metrics_port is not None:
        logger.warning(
            "--host %s: everybody who reaches --metrics_port can read /metrics", config.host
        )
    if config.has_keys and config.ssl_certfile is None:
        logger.warning(
            "--host %s: API keys and prompts travel in the clear. Set --ssl_certfile and "
            "--ssl_keyfile, or let only a proxy with TLS reach the server",
            config.host,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def check_model(config: ServeConfig, spec: ModelSpec) -> None:
    """Raise ModelError unless weights, tokenizer and chat template are complete and consistent.
    Weights are not checked with `--load_format dummy`."""
    directory = Path(config.model_dir)
    if config.load_format == "auto":
        check_weights(directory, spec)
        check_draft(config, spec)
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
    """Parse the chat template: --chat_template, else the checkpoint's file, else `built_in` from
    tokenizer_config.json."""
    import jinja2  # not at import, so that `glimmer --help` stays quick

    kind = ModelError if config.chat_template is None else ConfigError
    path = Path(config.chat_template or f"{config.model_dir}/chat_template.jinja")
    if built_in and config.chat_template is None and not path.exists():
        path = path.with_name("tokenizer_config.json")
    try:
        text = str(built_in) if path.suffix == ".json" else path.read_text()
        # transformers extends Jinja by this tag.
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
    """Raise ConfigError if the weights, or on a GPU the weights and the longest request, cannot
    fit. This is an estimate from below: workers check again once the weights are loaded."""
    shapes = main_tensor_shapes(spec)
    if config.mtp_mode is not None:
        shapes |= nextn_tensor_shapes(spec)
    item_bytes = _BYTES[config.data_type or ""]
    needed = sum(map(math.prod, shapes.values())) * item_bytes / GIB
    if config.device == "cpu":
        available = hardware.host_memory / GIB
        if needed > available:
            raise ConfigError(
                f"the weights need {needed:.1f} GiB in {config.data_type}, this machine has "
                f"{available:.1f} GiB available; free memory or use a larger machine"
            )
        return
    usable = min(hardware.gpu_memory[: config.tp]) * config.mem_fraction / GIB
    rest = usable - needed / config.tp
    if rest < 0:
        raise ConfigError(
            f"the weights need {needed / config.tp:.1f} GiB per GPU, --mem_fraction "
            f"{config.mem_fraction} of the free memory is {usable:.1f} GiB; free memory or raise "
            "--tp or --mem_fraction"
        )
    capacity, flag = config.max_req_total_len or spec.max_position_embeddings, "max_req_total_len"
    if config.max_total_token_num is not None:
        capacity, flag = config.max_total_token_num, "max_total_token_num"
    token_bytes = num_kv_layers(spec, config) * spec.latent_dim * item_bytes
    if capacity * token_bytes > rest * GIB:
        kv_gib = capacity * token_bytes / GIB
        fitting = int(rest * GIB / token_bytes)
        raise ConfigError(
            f"--{flag} {capacity} needs {kv_gib:.1f} GiB of KV cache per GPU, {rest:.1f} GiB are "
            f"left beside the weights; lower it to less than {fitting}, or free memory or raise "
            "--tp or --mem_fraction"
        )
