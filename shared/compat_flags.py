"""LightLLM's flags and environment variables that have no field in `ServeConfig`.

A flag is accepted with a warning if ignoring it changes no answer. It is refused, with the reason,
if it asks for something that the server does not do.
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
_OWN_SCHEDULER = "the scheduler divides every step between prompts and running requests"
_OWN_COLLECTIVES = "the collective operations are chosen by the server"
_NO_DISAGGREGATION = "prefill and decode run in one server"
_NO_TRAINING = "there are no endpoints for training"
_MOE = "experts are split over the tp ranks"
_CACHE = "the prefix cache lives in device memory only"
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
        "only 'normal' is: prefill and decode run in one server",
        _RUN_MODES,
    ),
    CompatFlag("dp", "int", 1, True, "use --tp for several GPUs"),
    CompatFlag("nnodes", "int", 1, True, _ONE_NODE),
    CompatFlag("node_rank", "int", 0, True, _ONE_NODE),
    *_ignored("--dp is always 1", "flag", "enable_dp_prompt_cache_fetch"),
    CompatFlag(
        "dp_balancer", "str", None, False, "--dp is always 1", ("round_robin", "bs_balancer")
    ),
    *_ignored(_ONE_NODE, "int", "multinode_httpmanager_port", "multinode_router_gloo_port"),
    *_ignored("ranks connect over the loopback interface", "str", "nccl_host"),
    *_ignored("ranks connect over a private address", "int", "nccl_port"),
    *_ignored(_ONE_NODE, "flag", "use_config_server_to_init_nccl"),
    *_ignored("the HTTP server needs no file", "str", "hypercorn_config"),
    *_ignored("links are private ipc sockets", "str", "zmq_mode"),
    *_ignored(_NO_DISAGGREGATION, "str", "pd_master_ip", "pd_master_mode"),
    *_ignored(_NO_DISAGGREGATION, "str", "pd_trans_mode", "select_p_d_node_strategy"),
    *_ignored(_NO_DISAGGREGATION, "int", "pd_master_port", "pd_kv_page_num", "pd_kv_page_size"),
    *_ignored(_NO_DISAGGREGATION, "int", "pd_decode_rpyc_port"),
    # model and text
    CompatFlag(
        "tokenizer_mode", "str", None, False, "the fast one is used", ("slow", "fast", "auto")
    ),
    CompatFlag("load_way", "str", "HF", True, "only Hugging Face safetensors are read"),
    *_ignored("code in a checkpoint is never run", "flag", "trust_remote_code"),
    *_ignored("prompts are never logged", "flag", "detail_log"),
    *_ignored("no shared memory is used", "flag", "disable_shm_warning"),
    *_refused("prompts are run as they are", "flag", "token_healing_mode"),
    *_refused("use the request's allowed_token_ids", "flag", "first_token_constraint_mode"),
    *_refused("the model generates text; it gives no scores", "flag", "use_reward_model"),
    *_refused("replies do not contain expert ids", "flag", "enable_return_routed_experts"),
    CompatFlag(
        "long_truncation_mode",
        "str",
        "None",
        True,
        "a prompt that is too long gets a 400",
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
    CompatFlag("quant_type", "str", "none", True, "weights are used as the checkpoint holds them"),
    *_refused("weights are used as the checkpoint holds them", "str", "quant_cfg"),
    CompatFlag(
        "expert_dtype",
        "str",
        None,
        True,
        "weights are used as the checkpoint holds them",
        ("fp8", "fp4"),
    ),
    CompatFlag("llm_kv_type", "str", "None", True, "KV is kept in the compute type"),
    *_ignored("KV is not quantised", "int", "llm_kv_quant_group_size"),
    *_refused("KV is not quantised", "str", "kv_quant_calibration_config_path"),
    *_ignored(_CACHE, "flag", "enable_cpu_cache", "enable_disk_cache"),
    *_ignored(_CACHE, "float", "cpu_cache_storage_size", "disk_cache_storage_size"),
    *_ignored(_CACHE, "int", "cpu_cache_token_page_size"),
    *_ignored(_CACHE, "str", "disk_cache_dir"),
    *_ignored(_MOE, "flag", "enable_ep_moe", "auto_update_redundancy_expert"),
    *_ignored(_MOE, "str", "ep_redundancy_expert_config_path"),
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
    CompatFlag("hardware_platform", "str", "cuda", True, "use --device", ("cuda", "musa")),
    *_ignored("see --llm_prefill_att_backend", "flag", "enable_torch_fallback"),
    *_ignored("see --llm_prefill_att_backend", "flag", "enable_triton_fallback"),
    CompatFlag(
        "enable_profiling",
        "str",
        None,
        False,
        "/profiler_start and /profiler_stop answer 400",
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

# All flags with these prefixes are accepted, with any number of values, and ignored: LightLLM keeps
# adding such flags.
FAMILIES = {
    "visual_": _MULTIMODAL,
    "audio_": _MULTIMODAL,
    "vit_": _MULTIMODAL,
    "afs_": _MULTIMODAL,
    "max_image_": _MULTIMODAL,
    "enable_multimodal": _MULTIMODAL,
    "linear_att_": _NO_LINEAR,
    "config_server_": _NO_DISAGGREGATION,
}

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
