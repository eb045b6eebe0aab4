"""/metrics: every LightLLM name with its type, and values that are true."""

from typing import Any

import pytest
from glimmer.shared.messages import BATCH_SIZES, STEP_SECONDS, Finished, StepTimes
from prometheus_client.parser import text_string_to_metric_families

COUNTERS = "request_count request_success request_failure prompt_tokens generation_tokens"
HISTOGRAMS = (
    "request_duration request_validation_duration request_inference_duration "
    "request_mean_time_per_token_duration request_first_token_duration "
    "request_queue_duration_bucket request_input_length request_generated_tokens "
    "request_max_new_tokens cache_length cache_ratio request_mtp_avg_token_per_step "
    "batch_inference_duration_bucket batch_next_size"
)
GAUGES = (
    "batch_current_size batch_pause_size queue_size batch_current_max_tokens cache_hit_rate "
    "gen_throughput num_running_reqs"
)


async def families(server: Any) -> dict[str, Any]:
    async with server.session.get(server.url + "/metrics") as reply:
        assert reply.status == 200
        assert reply.headers["Content-Type"].startswith("text/plain; version=")
        text = await reply.text()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(found: dict[str, Any], sample: str, **labels: str) -> float:
    for family in found.values():
        for one in family.samples:
            if one.name == sample and labels.items() <= one.labels.items():
                return one.value
    raise AssertionError(f"no sample {sample} {labels}")


async def test_every_name_has_its_type_and_the_model_label(server: Any) -> None:
    found = await families(server)
    for kind, names in (("counter", COUNTERS), ("histogram", HISTOGRAMS), ("gauge", GAUGES)):
        for name in names.split():
            family = found[f"lightllm_{name}"]
            assert family.type == kind, name
            assert family.samples, name
            assert all(s.labels["model_name"] == "tiny" for s in family.samples)
    methods = {s.labels["method"] for s in found["lightllm_batch_inference_count"].samples}
    assert methods == {"prefill", "decode"}


async def test_steps_are_counted_and_timed_by_kind(server: Any) -> None:
    decode, sizes = [0] * (len(STEP_SECONDS) + 1), [0] * (len(BATCH_SIZES) + 1)
    decode[0], decode[2], decode[-1] = 5, 3, 1
    sizes[0], sizes[3], sizes[-1] = 4, 2, 1
    server.engine.beat(
        steps=9,
        decode_steps=StepTimes(decode, 2.5),
        prefill_steps=StepTimes([1, *decode[1:]], 1.0),
        batch_sizes=sizes,
        batch_rows=700,
    )
    await server.settle(lambda: server.frontend.client.state.heartbeat.steps == 9)
    found = await families(server)
    name = "lightllm_batch_inference"
    assert value(found, f"{name}_count_total", method="decode") == 9
    assert value(found, f"{name}_count_total", method="prefill") == 5
    duration = f"{name}_duration_bucket"
    assert value(found, f"{duration}_sum", method="decode") == 2.5
    assert value(found, f"{duration}_count", method="decode") == 9
    bounds = {le: value(found, f"{duration}_bucket", method="decode", le=le) for le in ("0.0015",)}
    assert bounds == {"0.0015": 5}
    assert value(found, f"{duration}_bucket", method="decode", le="+Inf") == 9
    size = "lightllm_batch_next_size"
    assert (value(found, f"{size}_count"), value(found, f"{size}_sum")) == (7, 700)
    assert value(found, f"{size}_bucket", le="4.0") == 6
    assert value(found, f"{size}_bucket", le="128.0") == 6


async def test_drafts_are_counted_by_position(server: Any) -> None:
    server.engine.beat(
        steps=9,
        draft_length=2,
        decoded_rows=200,
        drafts_offered=[160, 100, 0],
        drafts_accepted=[80, 40, 0],
    )
    await server.settle(lambda: server.frontend.client.state.heartbeat.steps == 9)
    found = await families(server)
    assert value(found, "glimmer_draft_length") == 2
    assert value(found, "glimmer_mtp_avg_token_per_step") == 1.6
    assert value(found, "glimmer_drafts_total", position="1") == 160
    assert value(found, "glimmer_drafts_accepted_total", position="2") == 40


async def test_gateways_find_the_size_of_the_cache(server: Any) -> None:
    [sample] = (await families(server))["vllm:cache_config_info"].samples
    assert sample.value == 1
    assert (sample.labels["block_size"], sample.labels["num_gpu_blocks"]) == ("64", "100")


async def test_one_of_several_processes_labels_what_it_observed(start: Any) -> None:
    server = await start(httpserver_workers=2)
    await server.post("/generate", {"inputs": [1, 2], "parameters": {"max_new_tokens": 1}})
    found = await families(server)
    assert value(found, "lightllm_request_count_total", frontend="0") == 1
    assert value(found, "lightllm_request_duration_count", frontend="0") == 1
    for sample in found["glimmer_pages"].samples:
        assert "frontend" not in sample.labels, "the engine's, the same from every process"


async def test_requests_are_counted_with_their_tokens(server: Any) -> None:
    await server.post("/generate", {"inputs": [1, 2, 3, 4], "parameters": {"max_new_tokens": 4}})
    await server.post("/v1/completions", {"prompt": "the", "max_tokens": 2})
    found = await families(server)
    assert value(found, "lightllm_request_count_total") == 2
    assert value(found, "lightllm_request_success_total") == 2
    assert value(found, "lightllm_request_failure_total") == 0
    assert value(found, "lightllm_prompt_tokens_total") == 5
    assert value(found, "lightllm_generation_tokens_total") == 6
    assert value(found, "lightllm_request_first_token_duration_count") == 2
    assert value(found, "lightllm_request_max_new_tokens_sum") == 6
    assert value(found, "lightllm_cache_length_sum") == 4
    assert value(found, "lightllm_cache_hit_rate") == 1.0
    assert value(found, "lightllm_request_queue_duration_bucket_count") == 2


async def test_failures_are_counted(start: Any) -> None:
    server = await start()
    server.engine.refusal = Finished(0, "error", message="boom")
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 500
    found = await families(server)
    assert value(found, "lightllm_request_failure_total") == 1
    assert value(found, "lightllm_request_success_total") == 0
    assert (await server.post("/generate", {"inputs": 5}))[0] == 400  # before it is a request
    found = await families(server)
    assert value(found, "lightllm_request_count_total") == 2
    assert value(found, "lightllm_request_failure_total") == 2


async def test_the_engines_numbers_are_those_of_its_last_heartbeat(server: Any) -> None:
    server.engine.beat(num_running=4, num_waiting=3, num_paused=2, steps=9)
    state = server.frontend.client.state
    await server.settle(lambda: state.heartbeat.steps == 9)
    found = await families(server)
    expected = {
        "lightllm_batch_current_size": 4,
        "lightllm_num_running_reqs": 4,
        "lightllm_queue_size": 3,
        "lightllm_batch_pause_size": 2,
        "lightllm_batch_current_max_tokens": 3200,
        "vllm:num_requests_running": 4,
        "vllm:num_requests_waiting": 5,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:gpu_cache_usage_perc": 0.25,
        "vllm:prefix_cache_hits_total": 250,
        "vllm:prefix_cache_queries_total": 1000,
        "glimmer_preemptions_total": 2,
        "vllm:num_preemptions_total": 2,
        "vllm:generation_tokens_total": 77,
        "glimmer_ready": 1,
    }
    for name, number in expected.items():
        assert value(found, name) == pytest.approx(number), name


async def test_metrics_work_before_the_first_heartbeat(start: Any) -> None:
    server = await start(ready=False)
    found = await families(server)
    assert value(found, "glimmer_ready") == 0
    assert "lightllm_request_count" in found
