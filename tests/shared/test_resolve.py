import dataclasses
from pathlib import Path

import pytest
from flash import SPEC as FLASH
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ConfigError
from glimmer.shared.flags import parse_serve_args
from glimmer.shared.model_spec import ModelSpec
from glimmer.shared.resolve import Hardware, resolve

CPU = Hardware(host_memory=1 << 36, num_cpus=8)
FOUR_GPUS = Hardware(host_memory=1 << 36, num_cpus=8, gpu_memory=(80 << 30,) * 4)
GUIDE = """--model_dir /path/to/GLM-4.7-Flash/ --tp 1 --max_req_total_len 202752
--chunked_prefill_size 8192 --llm_prefill_att_backend fa3 --llm_decode_att_backend flashinfer
--graph_max_batch_size 512 --tool_call_parser glm47 --reasoning_parser glm45 --mtp_step 4
--mtp_mode eagle_with_att --mtp_draft_model_dir /path/to/GLM-4.7-Flash/ --host 0.0.0.0"""
EAGLE = "--mtp_mode eagle_with_att --mtp_step 2"


def settle(line: str = "", hardware: Hardware = CPU, spec: ModelSpec = FLASH) -> ServeConfig:
    return resolve(parse_serve_args(["--model_dir", "/m/x/", *line.split()], {}), spec, hardware)


def problems(line: str, hardware: Hardware = CPU) -> str:
    with pytest.raises(ConfigError) as caught:
        settle(line, hardware)
    return str(caught.value)


def test_nothing_is_left_open() -> None:
    config = settle()
    open_by_design = {"model_owner", "chat_template", "max_total_token_num", "performance_mode"}
    open_by_design |= {"mtp_mode", "mtp_draft_model_dir", "reasoning_parser", "runtime_dir"}
    open_by_design |= {"metric_gateway", "metrics_port", "api_key_file", "key_max_requests"}
    open_by_design |= {"ssl_certfile", "ssl_keyfile", "otlp_traces_endpoint"}
    open_by_design |= {"key_max_queued_tokens", "key_tokens_per_minute"}
    values = dataclasses.asdict(config)
    assert {name for name, value in values.items() if value is None} == open_by_design
    assert "auto" not in (config.device, *config.llm_prefill_att_backend)


def test_defaults_come_from_model_and_machine() -> None:
    config = settle()
    assert config.device == "cpu"
    assert config.data_type == "bfloat16"
    assert config.eos_id == (154820, 154827, 154829)
    assert config.max_req_total_len == 202752
    assert (config.batch_max_tokens, config.chunked_prefill_size) == (2048, 2048)
    assert (config.model_dir, config.model_name) == ("/m/x", "x")
    assert config.running_max_req_size == 256
    on_gpu = settle(hardware=FOUR_GPUS)
    assert on_gpu.device == "cuda"
    assert (on_gpu.batch_max_tokens, on_gpu.chunked_prefill_size) == (8192 + 256, 8192)
    assert on_gpu.llm_prefill_att_backend == ("auto",)
    asked = settle("--llm_prefill_att_backend fa3 triton", FOUR_GPUS)
    assert asked.llm_prefill_att_backend == ("fa3",)


def test_small_pages_are_refused_where_drafts_cannot_have_them() -> None:
    assert "--page_size 4 with --mtp_mode" in problems(f"--page_size 4 {EAGLE}", FOUR_GPUS)
    settle(f"--page_size 16 {EAGLE}", FOUR_GPUS)
    settle("--page_size 4", FOUR_GPUS)
    settle(f"--page_size 4 {EAGLE}")


def test_what_the_user_said_stays() -> None:
    line = "--device cpu --data_type fp32 --eos_id 3 --max_req_total_len 100 --model_name me"
    line += " --batch_max_tokens 64 --chunked_prefill_size 32 --running_max_req_size 7"
    config = settle(line, FOUR_GPUS)
    assert (config.device, config.data_type, config.eos_id) == ("cpu", "float32", (3,))
    assert (config.max_req_total_len, config.model_name) == (100, "me")
    assert (config.batch_max_tokens, config.chunked_prefill_size) == (64, 32)
    assert config.running_max_req_size == 7


@pytest.mark.parametrize("hardware", [CPU, FOUR_GPUS])
def test_the_guides_script_starts_and_says_what_is_missing(
    hardware: Hardware, caplog: pytest.LogCaptureFixture
) -> None:
    config = resolve(parse_serve_args(GUIDE.split(), {}), FLASH, hardware)
    assert config.model_name == "GLM-4.7-Flash"
    assert config.chunked_prefill_size == 8192 <= (config.batch_max_tokens or 0)
    assert config.running_max_req_size == 512
    assert (config.mtp_mode, config.mtp_step) == ("eagle_with_att", 4)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    on_cpu = sum("torch reference instead of fa3 and flashinfer" in w for w in warnings)
    assert on_cpu == (config.device == "cpu")


def test_chunking_and_budget_follow_each_other() -> None:
    assert settle("--batch_max_tokens 100").chunked_prefill_size == 100
    assert settle("--chunked_prefill_size 5000").batch_max_tokens == 5000
    assert settle("--max_total_token_num 1000").batch_max_tokens == 1000
    whole = settle("--disable_chunked_prefill --max_req_total_len 9000")
    assert (whole.batch_max_tokens, whole.chunked_prefill_size) == (9000, 9000)


def test_personal_mode_sets_only_what_was_left_open() -> None:
    config = settle("--p_mode personal --batch_max_tokens 4096")
    assert config.running_max_req_size == config.graph_max_batch_size == 6
    assert (config.batch_max_tokens, config.chunked_prefill_size) == (4096, 1024)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--tp 3", "--tp 3 does not divide the 20 attention heads; use one of 1, 2, 4, 5, 10, 20"),
        ("--max_req_total_len 202753", "--max_req_total_len 202753: the model supports 202752"),
        ("--chunked_prefill_size 9 --batch_max_tokens 8", "raise --batch_max_tokens to 9"),
        ("--disable_chunked_prefill --batch_max_tokens 8", "raise --batch_max_tokens to 202752"),
        ("--max_total_token_num 8 --batch_max_tokens 9", "--max_total_token_num 8 is below"),
        ("--max_total_token_num 63", "below --page_size 64"),
        ("--grouping_key a", "--grouping_key a: needs key=value"),
        ("--grouping_key a=b =c", "--grouping_key =c: needs key=value"),
        ("--port 65536", "--port 65536: needs to be from 0 to 65535"),
        ("--mem_fraction 1.5", "--mem_fraction 1.5: needs to be from"),
        ("--mem_fraction nan", "--mem_fraction nan"),
        ("--tp 0", "--tp 0: needs to be from 1"),
        ("--httpserver_workers 0", "--httpserver_workers 0"),
        ("--mtp_step 8", "--mtp_step 8: needs to be from 0 to 7"),
        ("--mtp_step 2", "--mtp_step 2 needs --mtp_mode"),
        ("--mtp_draft_model_dir a", "--mtp_draft_model_dir needs --mtp_mode"),
        ("--mtp_mode eagle_with_att", "needs --mtp_step of 1 to 7"),
        ("--mtp_mode eagle_no_att --mtp_step 1", "use eagle_with_att"),
        ("--mtp_mode vanilla_with_att --mtp_step 3 --mtp_draft_model_dir a b", "give 1 or 3"),
        ("--mtp_forced_acceptance 0.5 --load_format dummy", "needs --mtp_mode"),
        (f"{EAGLE} --mtp_forced_acceptance 0.7 0.5", "use it only with --load_format dummy"),
        (f"{EAGLE} --mtp_forced_acceptance 0.7 --load_format dummy", "needs 2 shares"),
        (f"{EAGLE} --mtp_forced_acceptance 0.5 0.7 --load_format dummy", "none above the one"),
        (f"{EAGLE} --mtp_forced_acceptance 1.5 0.7 --load_format dummy", "from 1 to 0"),
        ("--tool_call_parser qwen25", "--tool_call_parser qwen25"),
        ("--reasoning_parser deepseek-r1", "use glm45"),
        ("--eos_id 154856", "--eos_id 154856: the tokenizer has ids 0 to 154855"),
        ("--chat_template /no/such/file", "no such file"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(line: str, words: str) -> None:
    assert words in problems(line)


def test_all_problems_are_listed_at_once() -> None:
    text = problems("--tp 3 --max_req_total_len 300000 --reasoning_parser kimi --mtp_step 2")
    assert len(text.splitlines()) == 4


def test_more_ranks_than_gpus_are_refused() -> None:
    assert "needs as many GPUs, 4 can be used" in problems("--tp 5", FOUR_GPUS)
    assert "needs as many GPUs, 0 can be used" in problems("--device cuda")
    assert settle("--tp 5 --device cpu", FOUR_GPUS).tp == 5


def test_a_checkpoint_type_that_cannot_be_computed_in_is_refused() -> None:
    spec = dataclasses.replace(FLASH, dtype="float8_e4m3fn")
    with pytest.raises(ConfigError, match="use --data_type"):
        settle(spec=spec)
    assert settle("--data_type bf16", spec=spec).data_type == "bfloat16"


def test_a_chat_template_that_exists_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.touch()
    assert settle(f"--chat_template {file}").chat_template == str(file)


def test_keys_and_routes_open_to_everybody_contradict_each_other() -> None:
    assert "use --admin_api_key" in problems("--enable_admin_api --api_key x")
    assert settle("--enable_admin_api").enable_admin_api
    assert "--ssl_keyfile needs --ssl_certfile" in problems("--ssl_keyfile k")
