"""LightLLM's flags and environment variables that have no field in `ServeConfig`.

A flag is accepted with a warning if the server without it is the one that was asked for. It is
refused if it would make another server of it. A refusal says what the flag would do, and what to do
instead.
"""

from typing import Any, NamedTuple


class CompatFlag(NamedTuple):
    """One flag. `kind` is flag, int, float, str or append. `default` is LightLLM's default."""

    name: str
    kind: str
    default: Any
    refused: bool  # if the value is not the default; other flags are accepted with a warning
    reason: str
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


def _ignored(reason: str, kind: str, *names: str) -> tuple[CompatFlag, ...]:
    default = False if kind == "flag" else None
    return tuple(CompatFlag(name, kind, default, False, reason) for name in names)


def _refused(reason: str, kind: str, *names: str) -> tuple[CompatFlag, ...]:
    default = False if kind == "flag" else None
    return tuple(CompatFlag(name, kind, default, True, reason) for name in names)


_RUN_MODES = (
    *("normal", "prefill", "decode", "pd_master", "config_server"),
    *("nixl_prefill", "nixl_decode", "visual_only"),
)
_ONE_NODE = "the server runs on one node"
_NODES = (
    "it would spread one model over machines; use --tp for the GPUs of one machine, and a router "
    "before several servers"
)
_PD = (
    "it would divide prefill and decode between servers; leave it out: this server does both, and "
    "a router may divide requests between several"
)
_HOST_CACHE = (
    "it would keep more of the prefix cache outside of device memory; leave it out: "
    "--max_total_token_num and --mem_fraction set the size of the prefix cache"
)
_EP = "it would place whole experts on each GPU; leave it out: --tp splits every expert"
_MEANINGLESS_ALONE = "it has a meaning with a refused flag only"
_QUANTISED = "it would quantise the weights; leave it out, or give a smaller --data_type"
_KV_QUANTISED = "it would quantise KV; leave it out, or use more GPUs (--tp) for a larger KV cache"
_OWN_SCHEDULER = "the scheduler divides every step between prompts and running requests"
_OWN_COLLECTIVES = "the collective operations are chosen by the server"
_NO_DISAGGREGATION = "prefill and decode run in one server"
_NO_TRAINING = "it would open routes for training; leave it out: this server only generates"
_FORMAT = (
    "it would read weights of another format; leave it out, and give a directory of Hugging Face "
    "safetensors"
)
_PLATFORM = "it would use GPUs of another maker; leave it out: --device is cpu or cuda"
_GRAPHS = "the server decides which batches to capture"
_MULTIMODAL = "the model is text-only"
_STATS = "throughput figures are in /metrics"
_NO_LINEAR = "the model has no linear attention"
_OVERLAP = "the server does not use this overlap"

FLAGS: tuple[CompatFlag, ...] = (
    # processes and nodes
    CompatFlag(
        "run_mode",
        "str",
        "normal",
        True,
        "it would start one part of a divided server; leave it out: one server does all",
        _RUN_MODES,
    ),
    CompatFlag(
        "dp",
        "int",
        1,
        True,
        "it would run several copies of the model; start one server for each behind a router, or "
        "use --tp",
    ),
    CompatFlag("nnodes", "int", 1, True, _NODES),
    CompatFlag("node_rank", "int", 0, True, _NODES),
    *_ignored("--dp is always 1", "flag", "enable_dp_prompt_cache_fetch"),
    CompatFlag(
        "dp_balancer", "str", None, False, "--dp is always 1", ("round_robin", "bs_balancer")
    ),
    *_ignored(_ONE_NODE, "int", "multinode_httpmanager_port", "multinode_router_gloo_port"),
    *_ignored("ranks connect over the loopback interface", "str", "nccl_host"),
    *_ignored("ranks connect over a private address", "int", "nccl_port"),
    *_refused(_NODES, "flag", "use_config_server_to_init_nccl"),
    *_refused(
        "it would set addresses, limits and TLS of the HTTP server; use --host, --port, "
        "--ssl_certfile and --max_body_mb",
        "str",
        "hypercorn_config",
    ),
    *_ignored("links are private ipc sockets", "str", "zmq_mode"),
    CompatFlag("pd_master_ip", "str", "0.0.0.0", True, _PD),
    CompatFlag("pd_master_port", "int", 1212, True, _PD),
    CompatFlag("pd_master_mode", "str", "elastic", True, _PD),
    CompatFlag("pd_trans_mode", "str", "nccl", True, _PD),
    *_refused(_PD, "int", "pd_decode_rpyc_port"),
    *_ignored(_NO_DISAGGREGATION, "str", "select_p_d_node_strategy"),
    *_ignored(_NO_DISAGGREGATION, "int", "pd_kv_page_num", "pd_kv_page_size"),
    # model and text
    CompatFlag(
        "tokenizer_mode", "str", None, False, "the fast one is used", ("slow", "fast", "auto")
    ),
    CompatFlag("load_way", "str", "HF", True, _FORMAT),
    *_ignored("code in a checkpoint is never run", "flag", "trust_remote_code"),
    *_ignored("prompts are never logged", "flag", "detail_log"),
    *_ignored("no shared memory is used", "flag", "disable_shm_warning"),
    *_refused(
        "it would let outputs begin within the last token of the prompt; leave it out: prompts are "
        "run as they are",
        "flag",
        "token_healing_mode",
    ),
    *_refused(
        "it would limit the first token of all outputs; leave it out, and send allowed_token_ids "
        "with requests",
        "flag",
        "first_token_constraint_mode",
    ),
    *_refused(
        "it would answer with scores; leave it out: this server generates text",
        "flag",
        "use_reward_model",
    ),
    *_refused(
        "it would add expert ids to replies; leave it out: replies do not contain them",
        "flag",
        "enable_return_routed_experts",
    ),
    CompatFlag(
        "long_truncation_mode",
        "str",
        "None",
        True,
        "it would shorten prompts that are too long; leave it out: they get a 400",
        ("None", "head", "center"),
    ),
    *_refused(_NO_TRAINING, "flag", "enable_rl"),
    *_refused(_NO_TRAINING, "flag", "enable_torch_memory_saver", "enable_weight_cpu_backup"),
    # scheduling
    *_ignored("admission uses expected lengths", "float", "router_token_ratio"),
    *_ignored(_OWN_SCHEDULER, "int", "router_max_wait_tokens", "router_max_new_token_len"),
    *_ignored(_OWN_SCHEDULER, "flag", "disable_aggressive_schedule"),
    *_ignored(_OWN_SCHEDULER, "flag", "enable_prefill_decode_mixed"),
    *_ignored("the scheduler acts on events, not on a tick", "float", "schedule_time_interval"),
    *_ignored("the prefix cache is on by default", "flag", "use_dynamic_prompt_cache"),
    *_ignored("samples of one request always share their prompt", "flag", "diverse_mode"),
    CompatFlag(
        "output_constraint_mode",
        "str",
        None,
        False,
        "each request names its own constraint",
        ("outlines", "xgrammar", "none"),
    ),
    CompatFlag(
        "sampling_backend",
        "str",
        None,
        False,
        "there is one sampler",
        ("triton", "sglang_kernel", "flashinfer"),
    ),
    CompatFlag(
        "penalty_counter_mode",
        "str",
        None,
        False,
        "token counts live on the device",
        ("cpu_counter", "pin_mem_counter", "gpu_counter"),
    ),
    # graphs, kernels, caches
    *_ignored(_GRAPHS, "flag", "enable_prefill_cudagraph"),
    *_ignored(_GRAPHS, "int", "graph_split_batch_size", "graph_grow_step_size"),
    *_ignored(_GRAPHS, "int", "graph_max_len_in_batch"),
    CompatFlag(
        "prefill_cudagraph_max_handle_token",
        "int",
        None,
        False,
        _GRAPHS,
        aliases=("prefll_cudagraph_max_handle_token",),  # LightLLM's older spelling
    ),
    CompatFlag("quant_type", "str", "none", True, _QUANTISED),
    *_refused(_QUANTISED, "str", "quant_cfg"),
    CompatFlag(
        "expert_dtype",
        "str",
        None,
        True,
        _QUANTISED,
        ("fp8", "fp4"),
    ),
    CompatFlag("llm_kv_type", "str", "None", True, _KV_QUANTISED),
    *_ignored("KV is not quantised", "int", "llm_kv_quant_group_size"),
    *_refused(_KV_QUANTISED, "str", "kv_quant_calibration_config_path"),
    *_refused(_HOST_CACHE, "flag", "enable_cpu_cache", "enable_disk_cache"),
    *_ignored(_MEANINGLESS_ALONE, "float", "cpu_cache_storage_size", "disk_cache_storage_size"),
    *_ignored(_MEANINGLESS_ALONE, "int", "cpu_cache_token_page_size"),
    *_ignored(_MEANINGLESS_ALONE, "str", "disk_cache_dir"),
    *_refused(_EP, "flag", "enable_ep_moe", "auto_update_redundancy_expert"),
    *_refused(_EP, "str", "ep_redundancy_expert_config_path"),
    *_ignored("the server decides this", "flag", "enable_fused_shared_experts"),
    *_ignored(_OVERLAP, "flag", "enable_tpsp_mix_mode", "enable_dp_prefill_balance"),
    *_ignored(_OVERLAP, "flag", "enable_prefill_microbatch_overlap"),
    *_ignored(_OVERLAP, "flag", "enable_decode_microbatch_overlap"),
    *_ignored(_OWN_COLLECTIVES, "flag", "disable_custom_allreduce", "enable_custom_allgather"),
    *_ignored(_OWN_COLLECTIVES, "flag", "disable_symm_mem_allreduce"),
    *_ignored(_OWN_COLLECTIVES, "flag", "disable_flashinfer_allreduce"),
    *_ignored(
        "the model has no linear attention", "flag", "disable_linear_att_small_page_cpu_cache"
    ),
    CompatFlag("hardware_platform", "str", "cuda", True, _PLATFORM, ("cuda", "musa")),
    *_ignored("see --llm_prefill_att_backend", "flag", "enable_torch_fallback"),
    *_ignored("see --llm_prefill_att_backend", "flag", "enable_triton_fallback"),
    CompatFlag(
        "enable_profiling",
        "str",
        None,
        True,
        "it would open routes that write profiles; leave it out, and use "
        "glimmer bench latency --profile",
        ("torch_profiler", "nvtx"),
    ),
    # monitoring
    *_ignored("the launcher always watches its processes", "flag", "health_monitor"),
    *_ignored(_STATS, "flag", "disable_log_stats"),
    *_ignored(_STATS, "int", "log_stats_interval"),
    # images and sound, beside the families below
    *_ignored(_MULTIMODAL, "flag", "disable_vision", "disable_audio", "enable_mps"),
    *_ignored(_MULTIMODAL, "flag", "disable_image_resize"),
    *_ignored(_MULTIMODAL, "int", "cache_capacity"),
    *_ignored(_MULTIMODAL, "float", "cache_reserved_ratio", "embed_cache_storage_size"),
)

# All flags with these prefixes are known, with any number of values, and ignored: LightLLM keeps
# adding such flags.
FAMILIES = {
    "visual_": _MULTIMODAL,
    "audio_": _MULTIMODAL,
    "vit_": _MULTIMODAL,
    "afs_": _MULTIMODAL,
    "max_image_": _MULTIMODAL,
    "enable_multimodal": _MULTIMODAL,
    "linear_att_": _NO_LINEAR,
    "config_server_": _PD,
}
REFUSED_FAMILIES = frozenset({"config_server_"})  # these are refused instead

_NO_CAP = "request fields have no such small limits"
_INTERNAL = "it tunes code of LightLLM that does not exist here"

# Environment variables that are accepted and ignored, with the reason.
VARIABLES = {
    "LIGHTLLM_LOG_DIR": "logs go to stderr only",
    "HEALTH_FAILURE_THRESHOLD": "the launcher watches processes, not /health",
    "HEALTH_CHECK_INTERVAL_SECONDS": "the launcher watches processes, not /health",
    "DEBUG_HEALTHCHECK_RETURN_FAIL": "/health always reports the real state",
    "LIGHTLLM_ENABLE_TOOL_NAME_CHECK": "calls of undeclared tools are always dropped",
    "LIGHTLLM_STOP_SEQUENCE_MAX_LENGTH": _NO_CAP,
    "LIGHTLLM_STOP_SEQUENCE_STR_MAX_LENGTH": _NO_CAP,
    "LIGHTLLM_MAX_STOP_SEQUENCES": _NO_CAP,
    "LIGHTLLM_ALLOWED_TOKEN_IDS_MAX_LENGTH": _NO_CAP,
    "LIGHTLLM_INVALID_TOKEN_IDS_MAX_LENGTH": _NO_CAP,
    "LIGHTLLM_REGULAR_CONSTRAINT_MAX_LENGTH": _NO_CAP,
    "LIGHTLLM_GRAMMAR_CONSTRAINT_MAX_LENGTH": _NO_CAP,
    "LIGHTLLM_JSON_SCHEMA_MAX_LENGTH": _NO_CAP,
    "LIGHTLLM_MAX_PROMPT_LOGPROBS": _NO_CAP,
    "LIGHTLLM_TRACE_DIR": "no profiles are written",
    "LIGHTLLM_RADIX_TREE_MERGE_ENABLE": _INTERNAL,
    "LIGHTLLM_RADIX_TREE_MERGE_DELTA": _INTERNAL,
    "LIGHTLLM_OUT_TOKEN_QUEUE_SIZE": _INTERNAL,
    "LIGHTLLM_TOKEN_MAX_BYTES": _INTERNAL,
    "LIGHTLLM_DECODE_PREFIX_LENGTH": _INTERNAL,
    "ENABLE_FULL_ATT_DECODE_TUNE": _INTERNAL,
    "DISABLE_CHECK_MAX_LEN_INFER": _INTERNAL,
    "DISABLE_GPU_TENSOR_CACHE": _INTERNAL,
}
