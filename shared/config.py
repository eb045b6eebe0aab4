"""The configuration of a server. Flags, YAML keys and environment names (read by `flags.py`) and
`docs/configuration.md` are generated from the fields of `ServeConfig`. Only this file reads the
environment.

`ServeConfig` holds the user's values. `None` and "auto" mean that the server chooses: `resolve.py`
replaces them once. LightLLM's flags that have no field here are listed in `compat_flags.py`.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .log_format import FORMS

_PREFILL_BACKENDS = ("auto", "torch", "triton", "fa3", "flashinfer", "flashqla")
_DECODE_BACKENDS = ("auto", "torch", "triton", "fa3", "flashinfer")
_TOOL_PARSERS = (
    "glm47 qwen25 llama3 mistral deepseekv3 qwen deepseekv31 kimi_k2 deepseekv32 qwen3_coder"
).split()
_REASONING_FIELDS = ("both", "reasoning_content", "reasoning")
_REASONING_PARSERS = (
    "glm45 deepseek-r1 deepseek-v3 gpt-oss kimi kimi_k2 qwen3 qwen3-thinking minimax "
    "minimax-append-think step3 nano_v3 interns1 gemma4"
).split()
_DATA_TYPES = ("fp16", "float16", "bf16", "bfloat16", "fp32", "float32")
_HIDDEN_STATES = ("after_norm", "before_norm")
_MTP_MODES = ("vanilla_with_att", "eagle_with_att", "vanilla_no_att", "eagle_no_att")
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def _option(default: Any, help: str, **meta: Any) -> Any:  # noqa: A002 - argparse's own word
    """A field with its help text. `meta` may hold choices, env (an environment name), alias,
    repeatable, bounds (least and most, checked by `resolve`), secret (the field holds SHA-256
    digests of the values that were given), private (shown only to holders of an admin key) and
    internal (set by the launcher, no flag)."""
    return dataclasses.field(default=default, metadata={"help": help, **meta})


@dataclass(frozen=True)
class ServeConfig:
    """All settings of a server. Names and defaults follow LightLLM's flags."""

    # model
    model_dir: str = _option(
        "", "checkpoint directory, or 'demo' for the bundled model", private=True
    )
    model_name: str = _option("default_model_name", "name in /v1/models; default: the directory's")
    model_owner: str | None = _option(None, "owned_by in /v1/models")
    data_type: str | None = _option(
        None, "compute type; default: the checkpoint's", choices=_DATA_TYPES
    )
    device: str = _option("auto", "where workers run", choices=("auto", "cpu", "cuda"))
    load_format: str = _option("auto", "'dummy': random weights", choices=("auto", "dummy"))
    load_workers: int = _option(
        1, "threads that read checkpoint shards", env="LOADWORKER", bounds=(1, 1024)
    )
    eos_id: tuple[int, ...] | None = _option(None, "end tokens; default: config.json")
    chat_template: str | None = _option(
        None, "Jinja file instead of the checkpoint's template", private=True
    )
    verify_checksums: bool = _option(
        False,
        "before the start, compare the model's files with the SHA-256 checksums that came with it "
        "(SHA256SUMS, checksums.txt, *.sha256, or those of a download from Hugging Face)",
    )
    model_files: tuple[tuple[str, str], ...] = _option(
        (), "path and stamp of each file of the model, see fingerprint.py", internal=True
    )
    # limits and memory
    tp: int = _option(1, "tensor-parallel ranks", bounds=(1, 1024))
    max_req_total_len: int | None = _option(
        None, "longest prompt + output, in tokens; default: the model's", bounds=(2, 1 << 30)
    )
    max_total_token_num: int | None = _option(
        None, "KV capacity in tokens; default: from memory", bounds=(1, 1 << 40)
    )
    mem_fraction: float = _option(
        0.99,
        "share of device memory to use; what steps need is set aside first",
        bounds=(0.01, 0.99),
    )
    page_size: int = _option(64, "tokens per KV page", bounds=(1, 4096))
    running_max_req_size: int | None = _option(
        None,
        "most requests running at once; default: 256, or graph_max_batch_size if larger",
        bounds=(1, 1 << 16),
    )
    max_queued_requests: int = _option(
        4096, "most requests in the queue; more are refused with 429", bounds=(1, 1 << 30)
    )
    max_queued_tokens: int = _option(
        32_000_000,
        "most prompt tokens in the queue; more are refused with 429",
        bounds=(1, 1 << 40),
    )
    queue_timeout_s: float = _option(
        600.0, "longest wait in the queue; 0: no limit", bounds=(0, 1e9)
    )
    max_body_mb: float | None = _option(
        None,
        "largest request body; larger ones are refused with 413; default: 1 MB and 16 bytes per "
        "token of max_req_total_len",
        bounds=(0.001, 1024),
    )
    max_client_mb: float = _option(
        512.0,
        "most memory that one HTTP process holds for clients (bodies, prompts, unread replies), a "
        "quarter of it for one connection, half for one API key; more is refused with 429",
        bounds=(1, 1 << 20),
    )
    # scheduling
    batch_max_tokens: int | None = _option(
        None,
        "token budget of one step; default: a whole chunk and all decode rows (2048 on CPU)",
        bounds=(1, 1 << 24),
    )
    chunked_prefill_size: int | None = _option(
        None,
        "most prompt tokens of one request per step; default: 8192, or batch_max_tokens if smaller",
        bounds=(1, 1 << 24),
    )
    disable_chunked_prefill: bool = _option(False, "run each prompt in one step")
    disable_dynamic_prompt_cache: bool = _option(False, "turn the prefix cache off")
    graph_max_batch_size: int = _option(
        256, "largest decode batch captured as a CUDA graph", bounds=(1, 1 << 16)
    )
    disable_cudagraph: bool = _option(False, "run decode steps without CUDA graphs")
    performance_mode: str | None = _option(
        None, "'personal': limits for one user", choices=("personal",), alias="p_mode"
    )
    # kernels and speculative decoding
    llm_prefill_att_backend: tuple[str, ...] = _option(
        ("auto",), "backend of prefill attention; only the first is used", choices=_PREFILL_BACKENDS
    )
    llm_decode_att_backend: tuple[str, ...] = _option(
        ("auto",), "backend of decode attention; only the first is used", choices=_DECODE_BACKENDS
    )
    triton_autotune_level: int = _option(
        0,
        "kernel tiles: 0 stored ones, 1 tune missing ones, 2 tune all again, 3 built-in ones",
        choices=(0, 1, 2, 3),
        env="LIGHTLLM_TRITON_AUTOTUNE_LEVEL",
    )
    mtp_mode: str | None = _option(None, "speculative decoding mode", choices=_MTP_MODES)
    mtp_step: int = _option(0, "draft tokens per decode step", bounds=(0, 7))
    mtp_fixed_step: bool = _option(
        False, "always make mtp_step drafts; default: the fastest number at the moment"
    )
    mtp_hidden_states: tuple[str, ...] = _option(
        ("after_norm",),
        "hidden states given to the draft layer: of the main model, then its own; or one for both",
        choices=_HIDDEN_STATES,
    )
    mtp_draft_model_dir: tuple[str, ...] | None = _option(
        None, "draft checkpoint; default: model_dir", private=True
    )
    mtp_forced_acceptance: tuple[float, ...] = _option(
        (),
        "for benchmarks with load_format dummy: share of drafts accepted, one per position",
    )
    # HTTP
    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(8000, "port to listen on; 0: a free one", bounds=(0, 65535))
    metrics_port: int | None = _option(
        None,
        "second port for the probes and /metrics alone: needs no key, and is answered by a thread "
        "that does nothing else; 0: a free one; default: none",
        bounds=(0, 65535),
    )
    httpserver_workers: int = _option(1, "HTTP processes", bounds=(1, 256))
    drain_delay_s: float = _option(
        0.0,
        "after SIGTERM, keep accepting requests for this time while /readiness already fails; "
        "behind a load balancer: longer than it takes to notice",
        bounds=(0, 1e6),
    )
    drain_timeout_s: float = _option(
        60.0,
        "time for running requests to finish after SIGTERM and drain_delay_s",
        bounds=(0, 1e6),
    )
    start_timeout_s: float = _option(
        600.0, "give up starting when no process reports progress for this time", bounds=(1, 1e6)
    )
    step_timeout_s: float = _option(
        300.0, "restart the workers when a step has no result after this time", bounds=(1, 1e6)
    )
    health_timeout_s: float = _option(
        200.0,
        "/health fails when requests run and no token came for this time",
        env="HEALTH_TIMEOUT",
        bounds=(0.001, 1e6),
    )
    skip_special_tokens: bool = _option(
        False, "default of skip_special_tokens on /generate", env="SKIP_SPECIAL_TOKENS"
    )
    input_penalty: bool = _option(False, "default of input_penalty", env="INPUT_PENALTY")
    tool_call_parser: str | None = _option("glm47", "tool-call format", choices=_TOOL_PARSERS)
    reasoning_parser: str | None = _option(
        None, "reasoning format; default: reasoning stays in the text", choices=_REASONING_PARSERS
    )
    preserve_thinking: bool = _option(
        False, "keep the reasoning of earlier turns in prompts (default of clear_thinking: false)"
    )
    thinking_token_budget: int = _option(
        -1,
        "most tokens of a reasoning if the request does not say; -1: no limit",
        bounds=(-1, 1 << 30),
    )
    max_thinking_token_budget: int = _option(
        -1,
        "most tokens of any reasoning, whatever the request says; -1: no limit",
        bounds=(-1, 1 << 30),
    )
    repeat_unclosed_reasoning: bool = _option(
        False, "if a reply ends inside its reasoning, send the reasoning as content, too"
    )
    reasoning_field: str = _option(
        "both", "keys of the reasoning in chat replies", choices=_REASONING_FIELDS
    )
    strict_fields: bool = _option(
        False, "refuse requests with fields or tools that would have no effect"
    )
    grammar_timeout_s: float = _option(
        1.0, "most processor time to check a schema or grammar, in seconds", bounds=(0.1, 3600)
    )
    grammar_memory_mb: float = _option(
        512.0, "most memory to check a schema or grammar, in MB", bounds=(16, 1 << 20)
    )
    grammar_source_kb: float = _option(
        256.0, "largest schema or grammar of a request, in kB", bounds=(1, 1 << 20)
    )
    check_model_name: bool = _option(
        False, "answer 404 if a request names another model; default: any name is accepted"
    )
    enable_prompt_logprobs: bool = _option(
        False, "allow prompt_logprobs", alias="return_all_prompt_logprobs"
    )
    use_tgi_api: bool = _option(False, "/generate and /generate_stream speak TGI's format")
    return_list: bool = _option(
        False, "with use_tgi_api: a reply is a list of one element", env="RETURN_LIST"
    )
    enable_admin_api: bool = _option(
        False, "without API keys: allow /flush_cache and the abort_all of /abort_request"
    )
    # access
    api_key: tuple[str, ...] = _option(
        (),
        "key that requests must send; may be repeated; see also api_key_file",
        env="GLIMMER_API_KEY",
        secret=True,
    )
    api_key_file: str | None = _option(
        None, "file with a line name:sha256 per key; read again when it changes", private=True
    )
    admin_api_key: tuple[str, ...] = _option(
        (),
        "key for all routes, also those for administrators; may be repeated",
        env="GLIMMER_ADMIN_API_KEY",
        secret=True,
    )
    key_max_requests: int | None = _option(
        None, "most open requests per key; default: no limit", bounds=(1, 1 << 40)
    )
    key_max_queued_tokens: int | None = _option(
        None,
        "most prompt tokens per key that wait for their first output; default: no limit",
        bounds=(1, 1 << 40),
    )
    key_tokens_per_minute: int | None = _option(
        None,
        "most tokens per key and minute, of prompts and outputs; default: no limit",
        bounds=(1, 1 << 40),
    )
    shared_prefix_cache: bool = _option(
        False, "share cached prefixes between keys; default: only among requests of one key"
    )
    ssl_certfile: str | None = _option(
        None, "PEM file with the certificate: serve HTTPS; read again when it changes", private=True
    )
    ssl_keyfile: str | None = _option(
        None, "PEM file with the certificate's key; default: in ssl_certfile", private=True
    )
    # monitoring
    metric_gateway: str | None = _option(
        None, "push metrics to this Prometheus push gateway", private=True
    )
    job_name: str = _option("lightllm", "job name of pushed metrics")
    grouping_key: tuple[str, ...] = _option(
        (), "key=value that groups pushed metrics; may be repeated", repeatable=True
    )
    push_interval: float = _option(10.0, "seconds between pushes", bounds=(0.05, 1e6))
    enable_monitor_auth: bool = _option(
        False, "push with basic auth: environment variables USERNAME and PASSWORD"
    )
    otlp_traces_endpoint: str | None = _option(
        None,
        "send a trace of each request to this OpenTelemetry collector, such as "
        "http://127.0.0.1:4318/v1/traces; needs glimmer-serve[otel]",
        private=True,
    )
    # operation
    runtime_dir: str | None = _option(
        None, "private directory for sockets; default: a new one", private=True
    )
    log_level: str = _option("info", "log level", choices=_LOG_LEVELS, env="LIGHTLLM_LOG_LEVEL")
    log_format: str = _option(
        "text",
        "form of log lines: text, JSON objects, or text with priorities for the systemd journal, "
        "which is chosen by itself if stderr is the journal",
        choices=FORMS,
    )
    access_log: bool = _option(False, "log a line for every HTTP request")

    @property
    def has_keys(self) -> bool:
        """Whether requests need an API key."""
        return bool(self.api_key or self.admin_api_key or self.api_key_file is not None)

    @property
    def can_reload(self) -> bool:
        """Whether there are files that SIGHUP reads again."""
        return self.api_key_file is not None or self.ssl_certfile is not None

    def config_hash(self) -> str:
        """16 hex digits. Processes with equal digits have equal configurations."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write as JSON for the child processes, readable by this user only."""
        path.touch(mode=0o600)
        path.write_bytes(self.to_json())

    def to_json(self) -> bytes:
        """The bytes that `save` writes."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    @classmethod
    def load(cls, path: Path) -> "ServeConfig":
        """Read what `save` wrote."""
        raw = json.loads(path.read_text())
        return cls(**{name: _frozen(value) for name, value in raw.items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def flag_fields() -> "dict[str, dataclasses.Field[Any]]":
    """The fields that have a flag, by name."""
    fields = dataclasses.fields(ServeConfig)
    return {field.name: field for field in fields if not field.metadata.get("internal")}


FIELD_GROUPS = {  # first field of each group in flag help and docs
    "model_dir": "Model",
    "tp": "Limits and memory",
    "batch_max_tokens": "Scheduling",
    "llm_prefill_att_backend": "Kernels and speculative decoding",
    "host": "HTTP",
    "api_key": "Access",
    "metric_gateway": "Monitoring",
    "runtime_dir": "Operation",
}


def environment() -> dict[str, str]:
    """A copy of this process's environment."""
    return dict(os.environ)


def forget_secret_variables() -> None:
    """Remove the variables that hold API keys, so that no child process inherits them."""
    for field in dataclasses.fields(ServeConfig):
        if field.metadata.get("secret"):
            os.environ.pop(field.metadata["env"], None)


def stderr_is_journal() -> bool:
    """Whether systemd has connected stderr to its journal."""
    try:
        stderr = os.fstat(2)
    except OSError:  # it is closed
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


def take_service_manager() -> tuple[str, float]:
    """The socket on which systemd waits for messages about this process ("": it does not), and the
    longest time in seconds between two signs of life (0: no limit). Child processes do not get the
    variables, since the messages are about the launcher."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    watchdog_us, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    is_ours = watchdog_us.isdecimal() and pid in ("", str(os.getpid()))
    return address, int(watchdog_us) / 1e6 if is_ours else 0.0


def monitor_credentials() -> tuple[str, str]:
    """User and password for the push gateway. They are not in ServeConfig, because that is written
    to a file and shown by /get_server_info."""
    return os.environ.get("USERNAME", ""), os.environ.get("PASSWORD", "")


def child_environment(role: str, threads: int) -> dict[str, str]:
    """Environment of a child process: that of this process, with defaults for libraries. `threads`
    is the number for OpenMP in a worker. Variables that the user has set are kept."""
    defaults = {
        "OMP_NUM_THREADS": str(threads if role == "worker" else 1),
        # Idle threads sleep. Spinning threads take the cores from other processes, and then from
        # this one: a step took 20 times as long.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Ranks on GPUs find each other over TCP: only on this machine. By default NCCL takes the
        # first interface of the network.
        "NCCL_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",  # its thread pool does not work with child processes
        "HF_HUB_OFFLINE": "1",  # nothing is ever downloaded
    }
    return defaults | environment()
