"""The one configuration object. Flags, YAML keys, environment names and `docs/configuration.md`
are generated from its fields; nothing else in the project reads the environment.

`ServeConfig` holds what the user said; `None` or "auto" mean "decide for me" and are settled once
by `resolve`. LightLLM's flags that have no field here are listed in `compat_flags.py`.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _option(default: Any, help: str, **meta: Any) -> Any:  # noqa: A002 - argparse's own word
    """A field with its help text; `meta` may hold choices, env (environment name), alias, nargs."""
    return dataclasses.field(default=default, metadata={"help": help, **meta})


@dataclass(frozen=True)
class ServeConfig:
    """Everything a process needs to know. Names and defaults follow LightLLM's flags."""

    # model
    model_dir: str = _option("", "checkpoint directory, or 'demo' for the bundled model")
    model_name: str = _option("default_model_name", "name in /v1/models; default: the directory's")
    model_owner: str | None = _option(None, "owned_by in /v1/models")
    data_type: str | None = _option(None, "compute type; default: the checkpoint's")
    device: str = _option("auto", "where workers run", choices=("auto", "cpu", "cuda"))
    load_format: str = _option("auto", "'dummy': random weights", choices=("auto", "dummy"))
    load_workers: int = _option(1, "threads that read checkpoint shards", env="LOADWORKER")
    eos_id: tuple[int, ...] | None = _option(None, "end tokens; default: config.json", nargs="+")
    chat_template: str | None = _option(None, "Jinja file instead of the checkpoint's template")
    # limits and memory
    tp: int = _option(1, "tensor-parallel ranks")
    max_req_total_len: int | None = _option(None, "longest prompt + output, in tokens")
    max_total_token_num: int | None = _option(None, "KV capacity in tokens; default: from memory")
    mem_fraction: float = _option(0.9, "share of device memory to use")
    page_size: int = _option(64, "tokens per KV page")
    running_max_req_size: int | None = _option(None, "most requests running at once")
    max_queued_requests: int = _option(4096, "more waiting requests are refused with 429")
    max_queued_tokens: int = _option(32_000_000, "the same, in prompt tokens")
    queue_timeout_s: float = _option(600.0, "longest wait in the queue; 0: no limit")
    max_body_mb: float = _option(32.0, "larger request bodies are refused with 413")
    # scheduling
    batch_max_tokens: int | None = _option(None, "token budget of one step")
    chunked_prefill_size: int | None = _option(None, "most prompt tokens of one request per step")
    disable_chunked_prefill: bool = _option(False, "run each prompt in one step")
    disable_dynamic_prompt_cache: bool = _option(False, "turn the prefix cache off")
    graph_max_batch_size: int = _option(256, "largest decode batch captured as a CUDA graph")
    # HTTP
    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(8000, "port to listen on")
    httpserver_workers: int = _option(1, "HTTP processes")
    drain_timeout_s: float = _option(60.0, "time for running requests to finish after SIGTERM")
    step_timeout_s: float = _option(300.0, "a step without a result for so long: restart workers")
    health_timeout_s: float = _option(
        200.0, "/health fails after so long without a token while busy", env="HEALTH_TIMEOUT"
    )
    skip_special_tokens: bool = _option(
        False, "default of skip_special_tokens on /generate", env="SKIP_SPECIAL_TOKENS"
    )
    input_penalty: bool = _option(False, "default of input_penalty", env="INPUT_PENALTY")
    tool_call_parser: str | None = _option("glm47", "tool-call format")
    reasoning_parser: str | None = _option(None, "reasoning format")
    enable_prompt_logprobs: bool = _option(False, "allow prompt_logprobs")
    # operation
    runtime_dir: str | None = _option(None, "private directory for sockets; default: made anew")
    log_level: str = _option("info", "log level", env="LIGHTLLM_LOG_LEVEL")

    def config_hash(self) -> str:
        """16 hex digits that all processes of one server agree on."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write as JSON for the child processes, readable by this user only."""
        path.touch(mode=0o600)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> "ServeConfig":
        """Read what `save` wrote."""
        values = json.loads(path.read_text())
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
