"""Settles a `ServeConfig`: replaces each None and "auto" by a value, and checks all values.

This file does not look at the machine: `Hardware` describes it. All problems are reported together.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from .config import ServeConfig
from .errors import ConfigError
from .model_spec import ModelSpec

logger = logging.getLogger(__name__)

_TORCH_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_DEFAULT_NAME = "default_model_name"
_CPU_BATCH_TOKENS = 2048  # a step of 8k tokens would take a minute
_CHUNK_TOKENS = 8192
# With drafts, 4 tokens per page made an illegal memory access on an H200; 16 and 64 did not.
_LEAST_PAGE_WITH_DRAFTS = 16
_PERSONAL = {
    "running_max_req_size": 6,
    "batch_max_tokens": 2048,
    "chunked_prefill_size": 1024,
    "graph_max_batch_size": 6,
}


@dataclass(frozen=True)
class Hardware:
    """Resources of this host. Memory is in bytes, as free or available at the moment."""

    host_memory: int
    num_cpus: int
    gpu_memory: tuple[int, ...] = ()  # free, of each GPU that torch can use
    gpu_capabilities: tuple[float, ...] = ()  # compute capabilities of these GPUs, such as 9.0
    no_gpu_reason: str = ""  # why there is no GPU, and what to change


def resolve(config: ServeConfig, spec: ModelSpec, hardware: Hardware) -> ServeConfig:
    """The config with all values set. Logs the values that were chosen. Raises ConfigError listing
    every problem, each with the flag and the change that is needed."""
    problems = _range_problems(config)
    if not problems:
        problems = _mtp_problems(config)
        settled = _settle(config, spec, hardware)
        problems += _model_problems(settled, spec) + _size_problems(settled, spec)
        if settled.device == "cuda" and len(hardware.gpu_memory) < settled.tp:
            num_gpus = len(hardware.gpu_memory)
            reason = f": {hardware.no_gpu_reason}" if hardware.no_gpu_reason else ""
            problems.append(
                f"--tp {settled.tp} needs as many GPUs, {num_gpus} can be used here{reason}"
            )
    if problems:
        raise ConfigError("\n  ".join(problems))
    _report(config, settled)
    return settled


def default_body_mb(max_tokens: int) -> float:
    """The limit for a body, in MB, if the longest request has so many tokens. Text has 4 to 8
    bytes per token, and up to 12 with escapes."""
    return 1 + 16 * max_tokens / (1 << 20)


def _settle(config: ServeConfig, spec: ModelSpec, hardware: Hardware) -> ServeConfig:
    if config.performance_mode == "personal":
        fields = {field.name: field for field in dataclasses.fields(config)}
        untouched = {k: v for k, v in _PERSONAL.items() if getattr(config, k) == fields[k].default}
        config = dataclasses.replace(config, **untouched)  # type: ignore[arg-type]
    device = config.device
    if device == "auto":
        device = "cuda" if hardware.gpu_memory else "cpu"
    longest = config.max_req_total_len or spec.max_position_embeddings
    rows = config.running_max_req_size or max(256, config.graph_max_batch_size)
    if config.disable_chunked_prefill:
        chunk = longest
        batch = config.batch_max_tokens or longest
    else:
        # On a GPU, a whole chunk and all decode rows fit one step. More would only cost memory.
        default = (config.chunked_prefill_size or _CHUNK_TOKENS) + rows
        if device == "cpu":
            default = max(_CPU_BATCH_TOKENS, config.chunked_prefill_size or 0)
        if config.max_total_token_num is not None and config.chunked_prefill_size is None:
            default = min(default, config.max_total_token_num)
        batch = config.batch_max_tokens or default
        chunk = config.chunked_prefill_size or min(_CHUNK_TOKENS, batch)
    model_dir = Path(config.model_dir).absolute()
    name = config.model_name if config.model_name != _DEFAULT_NAME else model_dir.name
    return dataclasses.replace(
        config,
        model_dir=str(model_dir),
        model_name=name,
        device=device,
        data_type=_TORCH_NAMES.get(config.data_type or "", config.data_type or spec.dtype),
        eos_id=config.eos_id or spec.eos_token_ids,
        max_req_total_len=longest,
        max_body_mb=config.max_body_mb or default_body_mb(longest),
        batch_max_tokens=batch,
        chunked_prefill_size=chunk,
        running_max_req_size=rows,
        llm_prefill_att_backend=_attention(config.llm_prefill_att_backend, device),
        llm_decode_att_backend=_attention(config.llm_decode_att_backend, device),
    )


def _attention(backends: tuple[str, ...], device: str) -> tuple[str, ...]:
    """Only the first one is used. On a GPU "auto" stays: the kernels choose by type and head
    width."""
    return backends[:1] if device == "cuda" else ("torch",)


def _range_problems(config: ServeConfig) -> list[str]:
    problems = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        least, most = field.metadata.get("bounds", (None, None))
        if least is not None and value is not None and not least <= value <= most:
            problems.append(f"--{field.name} {value}: needs to be from {least} to {most}")
    if config.enable_admin_api and config.has_keys:
        problems.append(
            "--enable_admin_api opens routes to everybody; with API keys use --admin_api_key"
        )
    if config.ssl_keyfile is not None and config.ssl_certfile is None:
        problems.append("--ssl_keyfile needs --ssl_certfile")
    for pair in config.grouping_key:
        key, equals, _ = pair.partition("=")
        if not key or not equals:
            problems.append(f"--grouping_key {pair}: needs key=value")
    return problems


def _mtp_problems(config: ServeConfig) -> list[str]:
    if config.mtp_mode is None:
        problems = []
        if config.mtp_step:
            problems.append(f"--mtp_step {config.mtp_step} needs --mtp_mode; add it or drop both")
        if config.mtp_draft_model_dir:
            problems.append("--mtp_draft_model_dir needs --mtp_mode; add it or drop both")
        if config.mtp_forced_acceptance:
            problems.append("--mtp_forced_acceptance needs --mtp_mode; add it or drop both")
        return problems
    if not config.mtp_mode.endswith("_with_att"):
        kind = config.mtp_mode.split("_")[0]
        return [f"--mtp_mode {config.mtp_mode}: the draft layer has attention; use {kind}_with_att"]
    if config.mtp_step == 0:
        return [f"--mtp_mode {config.mtp_mode} needs --mtp_step of 1 to 7"]
    dirs = len(config.mtp_draft_model_dir or ())
    if config.mtp_mode == "vanilla_with_att" and dirs not in (0, 1, config.mtp_step):
        return [f"--mtp_draft_model_dir names {dirs} directories; give 1 or {config.mtp_step}"]
    forced = config.mtp_forced_acceptance
    if forced and config.load_format != "dummy":
        return ["--mtp_forced_acceptance makes wrong text: use it only with --load_format dummy"]
    shares = [1.0, *forced, 0.0]
    if forced and (len(forced) != config.mtp_step or shares != sorted(shares, reverse=True)):
        return [
            f"--mtp_forced_acceptance needs {config.mtp_step} shares, one per position, from 1 "
            "to 0, none above the one before it"
        ]
    return []


def _model_problems(config: ServeConfig, spec: ModelSpec) -> list[str]:
    problems = []
    if spec.num_heads % config.tp:
        divisors = [str(n) for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0]
        problems.append(
            f"--tp {config.tp} does not divide the {spec.num_heads} attention heads; "
            f"use one of {', '.join(divisors)}"
        )
    if config.data_type not in ("bfloat16", "float16", "float32"):
        problems.append(
            f"config.json: dtype {config.data_type!r} is not supported; use --data_type"
        )
    if config.tool_call_parser not in (None, "glm47"):
        problems.append(
            f"--tool_call_parser {config.tool_call_parser}: this model calls tools in another "
            "format; use glm47"
        )
    if config.reasoning_parser not in (None, "glm45"):
        problems.append(
            f"--reasoning_parser {config.reasoning_parser}: this model marks its reasoning in "
            "another format; use glm45"
        )
    invalid_ids = [i for i in config.eos_id or () if not 0 <= i < spec.num_token_ids]
    if invalid_ids:
        problems.append(
            f"--eos_id {invalid_ids[0]}: the tokenizer has ids 0 to {spec.num_token_ids - 1}"
        )
    if config.chat_template is not None and not Path(config.chat_template).is_file():
        problems.append(f"--chat_template {config.chat_template}: no such file")
    return problems


def _size_problems(config: ServeConfig, spec: ModelSpec) -> list[str]:
    longest, batch, chunk = (
        config.max_req_total_len or 0,
        config.batch_max_tokens or 0,
        config.chunked_prefill_size or 0,
    )
    problems = []
    if longest > spec.max_position_embeddings:
        problems.append(
            f"--max_req_total_len {longest}: the model supports {spec.max_position_embeddings}"
        )
    if chunk > batch:
        flag = "chunked_prefill_size"
        remedy = f"lower it or raise --batch_max_tokens to {chunk}"
        if config.disable_chunked_prefill:
            flag, remedy = (
                "disable_chunked_prefill with --max_req_total_len",
                (f"raise --batch_max_tokens to {longest} or lower --max_req_total_len"),
            )
        problems.append(f"--{flag} {chunk} exceeds --batch_max_tokens {batch}; {remedy}")
    capacity = config.max_total_token_num
    if capacity is not None and capacity < batch:
        problems.append(
            f"--max_total_token_num {capacity} is below --batch_max_tokens {batch}; "
            "raise the first or lower the second"
        )
    if capacity is not None and capacity < config.page_size:
        problems.append(f"--max_total_token_num {capacity} is below --page_size {config.page_size}")
    if config.device == "cuda" and config.mtp_mode and config.page_size < _LEAST_PAGE_WITH_DRAFTS:
        problems.append(
            f"--page_size {config.page_size} with --mtp_mode: on a GPU at least "
            f"{_LEAST_PAGE_WITH_DRAFTS}"
        )
    return problems


def _report(config: ServeConfig, settled: ServeConfig) -> None:
    backends = (*config.llm_prefill_att_backend[:1], *config.llm_decode_att_backend[:1])
    unused = [name for name in backends if name not in ("auto", "torch")]
    if unused and settled.device == "cpu":
        logger.warning("attention runs on the torch reference instead of %s", " and ".join(unused))
    rows = [
        f"  {field.name:24} {getattr(settled, field.name)}"
        for field in dataclasses.fields(settled)
        if getattr(settled, field.name) != getattr(config, field.name)
    ]
    logger.info("chosen by the server:\n%s", "\n".join(rows))
