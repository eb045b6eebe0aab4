import logging
import re
from pathlib import Path

import pytest
from glimmer.shared.compat_flags import FLAGS
from glimmer.shared.config import ServeConfig, flag_fields
from glimmer.shared.errors import ConfigError, UsageError
from glimmer.shared.flags import parse_serve_args, serve_parser
from glimmer.shared.secrets import key_digest

GUIDE = """--model_dir /path/to/GLM-4.7-Flash/ --tp 1 --max_req_total_len 202752
--chunked_prefill_size 8192 --llm_prefill_att_backend fa3 --llm_decode_att_backend flashinfer
--graph_max_batch_size 512 --tool_call_parser glm47 --reasoning_parser glm45 {mtp}
--host 0.0.0.0 --port 8000"""
GUIDE_MTP = "--mtp_step 4 --mtp_mode eagle_with_att --mtp_draft_model_dir /path/to/GLM-4.7-Flash/"
GUIDE_ENVIRONMENT = {"LIGHTLLM_TRITON_AUTOTUNE_LEVEL": "1", "LOADWORKER": "18"}

# Every flag that LightLLM takes, by what becomes of it, with a value where it takes one.
USED = """
model_dir=d tp=2 max_req_total_len=9 chunked_prefill_size=9 llm_prefill_att_backend=fa3
llm_decode_att_backend=flashinfer graph_max_batch_size=9 tool_call_parser=qwen25
reasoning_parser=glm45 host=h port=9 mtp_mode=eagle_with_att mtp_step=1 mtp_draft_model_dir=d
performance_mode=personal p_mode=personal httpserver_workers=2 model_name=n model_owner=o
max_total_token_num=9 mem_fraction=0.5 batch_max_tokens=9 eos_id=1 running_max_req_size=9
data_type=bf16 chat_template=f disable_dynamic_prompt_cache disable_chunked_prefill
use_tgi_api metric_gateway=a job_name=j grouping_key=a=b push_interval=1 enable_monitor_auth
enable_prompt_logprobs return_all_prompt_logprobs
""".split()
IGNORED = """
zmq_mode=tcp:// tokenizer_mode=slow dp_balancer=round_robin
multinode_httpmanager_port=1 multinode_router_gloo_port=1 nccl_host=h nccl_port=1
trust_remote_code detail_log disable_shm_warning
router_token_ratio=0.5 router_max_wait_tokens=1 disable_aggressive_schedule
enable_prefill_decode_mixed schedule_time_interval=0.03 use_dynamic_prompt_cache diverse_mode
output_constraint_mode=xgrammar sampling_backend=triton penalty_counter_mode=cpu_counter
graph_split_batch_size=1 graph_grow_step_size=1 graph_max_len_in_batch=1
enable_prefill_cudagraph prefill_cudagraph_max_handle_token=1
prefll_cudagraph_max_handle_token=1 llm_kv_quant_group_size=8
cpu_cache_storage_size=2 cpu_cache_token_page_size=256
disk_cache_storage_size=10 disk_cache_dir=d enable_dp_prompt_cache_fetch
enable_fused_shared_experts
enable_tpsp_mix_mode enable_dp_prefill_balance enable_prefill_microbatch_overlap
enable_decode_microbatch_overlap disable_custom_allreduce enable_custom_allgather
disable_symm_mem_allreduce disable_flashinfer_allreduce linear_att_hash_page_size=1
disable_linear_att_small_page_cpu_cache enable_torch_fallback enable_triton_fallback
health_monitor disable_log_stats log_stats_interval=1
router_max_new_token_len=1
visual_gpu_ids=0 visual_use_proxy_mode audio_gpu_ids=0 vit_att_backend=fa3 disable_vision
disable_audio enable_multimodal enable_multimodal_audio enable_mps cache_capacity=1
cache_reserved_ratio=0.5 embed_cache_storage_size=1 max_image_token_count=1
disable_image_resize afs_embed_capacity=1
select_p_d_node_strategy=cache_aware
pd_kv_page_num=16 pd_kv_page_size=1024
""".split()
REFUSED = """
token_healing_mode first_token_constraint_mode long_truncation_mode=head
use_reward_model enable_return_routed_experts enable_rl enable_torch_memory_saver
enable_weight_cpu_backup quant_type=awq quant_cfg=f expert_dtype=fp8 llm_kv_type=int8kv
kv_quant_calibration_config_path=f hardware_platform=musa
run_mode=prefill run_mode=nixl_decode run_mode=visual_only nnodes=2 node_rank=1 dp=2 load_way=DS
hypercorn_config=f use_config_server_to_init_nccl enable_cpu_cache enable_disk_cache enable_ep_moe
ep_redundancy_expert_config_path=f auto_update_redundancy_expert enable_profiling=nvtx
pd_master_ip=10.0.0.1 pd_master_port=1213 pd_master_mode=2p1d pd_trans_mode=nixl
pd_decode_rpyc_port=1 config_server_host=h config_server_port=1 config_server_visual_redis_port=1
""".split()
REFUSED_BUT_DEFAULT = """
run_mode=normal nnodes=1 node_rank=0 dp=1 load_way=HF quant_type=none llm_kv_type=None
long_truncation_mode=None hardware_platform=cuda pd_master_ip=0.0.0.0 pd_master_port=1212
pd_master_mode=elastic pd_trans_mode=nccl
""".split()


def words(flag: str) -> list[str]:
    name, _, value = flag.partition("=")
    return [f"--{name}", *([value] if value else [])]


def parse(line: str, **environ: str) -> ServeConfig:
    return parse_serve_args(line.split(), environ)


@pytest.mark.parametrize("mtp", ["", GUIDE_MTP])
def test_the_guides_scripts_parse_as_they_are(mtp: str, caplog: pytest.LogCaptureFixture) -> None:
    config = parse(GUIDE.format(mtp=mtp), **GUIDE_ENVIRONMENT)
    assert config.max_req_total_len == 202752
    assert config.llm_prefill_att_backend == ("fa3",)
    assert (config.load_workers, config.triton_autotune_level) == (18, 1)
    assert (config.host, config.port, config.reasoning_parser) == ("0.0.0.0", 8000, "glm45")
    assert config.mtp_step == (4 if mtp else 0)
    assert not caplog.records


@pytest.mark.parametrize("flag", USED)
def test_a_used_flag_changes_the_config(flag: str, caplog: pytest.LogCaptureFixture) -> None:
    assert parse_serve_args(words(flag), {}) != ServeConfig()
    assert not caplog.records


@pytest.mark.parametrize("flag", IGNORED)
def test_an_ignored_flag_is_warned_about_once(flag: str, caplog: pytest.LogCaptureFixture) -> None:
    assert parse_serve_args(words(flag), {}) == ServeConfig()
    assert len(caplog.records) == 1
    known_as = words(flag)[0].replace("prefll", "prefill")
    assert f"{known_as} has no effect: " in caplog.text


@pytest.mark.parametrize("flag", REFUSED)
def test_a_refused_flag_is_an_error_with_a_reason(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"{words(flag)[0]}.* is not supported: \S") as caught:
        parse_serve_args(words(flag), {})
    assert caught.value.exit_code == 3
    text = str(caught.value)
    assert "is not supported: it would " in text, "what the flag would do"
    assert "; " in text, "and what to do"


@pytest.mark.parametrize("flag", REFUSED_BUT_DEFAULT)
def test_a_refused_flag_may_have_its_default(flag: str, caplog: pytest.LogCaptureFixture) -> None:
    assert parse_serve_args(words(flag), {}) == ServeConfig()
    assert not caplog.records


def test_no_flag_of_the_table_is_left_out_of_the_lists_above() -> None:
    listed = {flag.partition("=")[0] for flag in (*USED, *IGNORED, *REFUSED)}
    assert {name for f in FLAGS for name in (f.name, *f.aliases)} <= listed


def test_all_refused_flags_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("--run_mode decode --enable_rl --quant_type awq")
    assert all(f"--{n}" in str(caught.value) for n in ("run_mode", "enable_rl", "quant_type"))


def test_a_repeated_key_adds_up() -> None:
    config = parse("--grouping_key zone=a --metric_gateway h:1 --grouping_key rack=b=c row=d")
    assert config.grouping_key == ("zone=a", "rack=b=c", "row=d")
    assert parse("").grouping_key == ()


def test_dashes_underscores_and_prefixes_are_the_same() -> None:
    expected = parse("--max_req_total_len 5 --mtp_draft_model_dir a b")
    assert parse("--max-req-total-len=5 --mtp-draft a b") == expected
    assert expected.mtp_draft_model_dir == ("a", "b")


def test_a_dash_in_a_value_stays() -> None:
    assert parse("--model-dir=/a-b --model_name x-y").model_dir == "/a-b"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--prt 1", "unknown flag --prt; did you mean --port?"),
        ("--max_total_len 1", "did you mean --max_req_total_len?"),
        ("--zzzzzz", "unknown flag --zzzzzz"),
        ("--port 1 stray", "unexpected argument stray"),
        ("--port x", "invalid int value"),
        ("--device tpu", "invalid choice: 'tpu'"),
        ("--tool_call_parser glm46", "invalid choice"),
        ("--run_mode both", "invalid choice"),
        ("--mtp", "ambiguous"),
        ("--port", "expected one argument"),
    ],
)
def test_what_does_not_parse_is_a_usage_error(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse(line)
    assert caught.value.exit_code == 2


def test_flags_win_over_yaml_over_environment(tmp_path: Path) -> None:
    file = tmp_path / "glimmer.yaml"
    file.write_text(
        "port: 1\nload-workers: 2\neos_id: [5, 6]\ndisable_chunked_prefill: true\n"
        "enable_prompt_logprobs: false\nmem_fraction: 1e-1\nmodel_dir:\nvisual_tp: 2\n"
    )
    config = parse(f"--config {file} --port 9", LOADWORKER="3", HEALTH_TIMEOUT="7")
    assert (config.port, config.load_workers, config.health_timeout_s) == (9, 2, 7.0)
    assert (config.eos_id, config.disable_chunked_prefill) == ((5, 6), True)
    assert (config.mem_fraction, config.model_dir) == (0.1, "")
    assert parse(f"--confi {file}").port == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown key 'prot'; did you mean port?"),
        ("config: x", "unknown key 'config'"),
        ("port: true", "port is True, needs a value"),
        ("disable_chunked_prefill: 1", "needs true or false"),
        ("port: many", "invalid int value: 'many'"),
        ("port: {a: 1}", "needs a value"),
        ("- port", "needs 'flag: value' lines"),
        ("port: [", "--config"),
        ("quant_type: awq", "--quant_type awq is not supported"),
    ],
)
def test_a_bad_yaml_file_is_a_config_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "glimmer.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(f"--config {file}")


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        parse(f"--config {tmp_path}/none.yaml")


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("LOADWORKER", "18", "load_workers", 18),
        ("HEALTH_TIMEOUT", "100", "health_timeout_s", 100.0),
        ("SKIP_SPECIAL_TOKENS", "True", "skip_special_tokens", True),
        ("SKIP_SPECIAL_TOKENS", "0", "skip_special_tokens", False),
        ("INPUT_PENALTY", "on", "input_penalty", True),
        ("LIGHTLLM_LOG_LEVEL", "DEBUG", "log_level", "debug"),
        ("LIGHTLLM_TRITON_AUTOTUNE_LEVEL", "3", "triton_autotune_level", 3),
        ("LOADWORKER", "", "load_workers", 1),
    ],
)
def test_environment_variables_set_fields(
    variable: str, text: str, field: str, value: object
) -> None:
    assert getattr(parse("", **{variable: text}), field) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("LOADWORKER", "many"),
        ("HEALTH_TIMEOUT", "soon"),
        ("SKIP_SPECIAL_TOKENS", "perhaps"),
        ("LIGHTLLM_LOG_LEVEL", "loud"),
        ("LIGHTLLM_TRITON_AUTOTUNE_LEVEL", "4"),
        ("LIGHTLLM_TRITON_AUTOTUNE_LEVEL", "one"),
    ],
)
def test_a_variable_that_does_not_parse_is_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable}='{text}'"):
        parse("", **{variable: text})


def test_ignored_variables_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    parse("", LIGHTLLM_LOG_DIR="/x")
    assert "LIGHTLLM_LOG_DIR has no effect: logs go to stderr only" in caplog.text


def test_help_names_every_field_with_its_default() -> None:
    text = serve_parser().format_help()
    for name in flag_fields():
        assert f"--{name}" in text
    assert "--model_files" not in text
    assert "(default 8000)" in text
    assert "--pd_master_ip" not in text


def test_parsing_says_nothing_when_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        parse("--model_dir x --port 1")
    assert not caplog.records


def test_keys_are_kept_as_digests_only() -> None:
    config = parse("--api_key one --api-key=two --admin_api_key three")
    assert config.api_key == (key_digest("one"), key_digest("two"))
    assert config.admin_api_key == (key_digest("three"),)
    assert "three" not in repr(config)
    assert config.has_keys
    assert not parse("").has_keys
    assert parse("--api_key_file f").has_keys


def test_a_key_flag_takes_one_value_only() -> None:
    with pytest.raises(UsageError, match="unexpected argument /model"):
        parse("--api_key one /model")


def test_keys_come_from_variables_and_files(tmp_path: Path) -> None:
    variables = {"GLIMMER_API_KEY": "one", "GLIMMER_ADMIN_API_KEY": "two"}
    config = parse("", **variables)
    assert config == parse("--api_key one --admin_api_key two")
    assert parse("--api_key other", **variables).api_key == (key_digest("other"),)
    path = tmp_path / "c.yaml"
    path.write_text("api_key: [one, 2]\nadmin_api_key: three")
    assert parse(f"--config {path}") == parse("--api_key one --api_key 2 --admin_api_key three")


@pytest.mark.parametrize("value", ["", " ", " x", "x ", "a\nb", "\udcff"])
def test_an_empty_key_is_refused_instead_of_letting_everybody_in(value: str) -> None:
    with pytest.raises(ConfigError, match="--api_key: a key is empty"):
        parse_serve_args([f"--api_key={value}"], {})
    with pytest.raises(ConfigError, match="--api_key: a key is empty"):
        parse_serve_args([], {"GLIMMER_API_KEY": value})


def test_a_mapping_of_keys_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("api_key: {me: sk-secret}")
    with pytest.raises(ConfigError, match="api_key is a mapping, needs a value") as caught:
        parse(f"--config {path}")
    assert "sk-secret" not in str(caught.value)
