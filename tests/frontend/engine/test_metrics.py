"""/metrics: every LightLLM name with its type, and values that are true."""

import asyncio
import shutil
import subprocess
from typing import Any

import pytest
from glimmer.shared.messages import (
    BATCH_SIZES,
    STEP_SECONDS,
    STEP_TOKENS,
    Finished,
    LauncherBeat,
    StepTimes,
)
from glimmer.shared.secrets import key_digest
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


async def test_a_scrape_shows_the_sums_of_all_processes(start: Any) -> None:
    server = await start(httpserver_workers=2)
    await server.post("/generate", {"inputs": [1, 2], "parameters": {"max_new_tokens": 1}})
    state, tally = server.frontend.client.state, server.frontend.metrics.tally
    tally.refresh()
    server.engine.send(LauncherBeat(totals=[3 * value for value in tally.values]))
    await server.settle(lambda: state.launcher is not None)
    found = await families(server)
    assert value(found, "lightllm_request_count_total") == 3
    assert value(found, "vllm:request_success_total", finished_reason="length") == 3
    assert value(found, "vllm:e2e_request_latency_seconds_count") == 3
    names = {name for family in found.values() for one in family.samples for name in one.labels}
    assert "frontend" not in names


async def test_times_in_the_engine_come_from_the_scheduler(server: Any) -> None:
    server.engine.manual = True
    waiting = asyncio.create_task(server.post("/generate", {"inputs": [1, 2]}))
    submit = (await server.engine.submitted())[0]
    server.engine.tokens(submit, [5, 6])
    times = {"queue_s": 3.0, "prefill_s": 0.2, "decode_s": 0.4}
    server.engine.finish(submit, "length", 2, **times)
    assert (await waiting)[0] == 200
    found = await families(server)
    for name, seconds in (("queue", 3.0), ("prefill", 0.2), ("decode", 0.4), ("inference", 0.6)):
        assert value(found, f"vllm:request_{name}_time_seconds_sum") == pytest.approx(seconds)
    for name in (
        "time_to_first_token_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        assert value(found, f"vllm:{name}_count") == 1
    assert value(found, "vllm:prompt_tokens_total") == 2


async def test_tokens_and_gaps_of_steps_come_from_the_heartbeat(server: Any) -> None:
    gaps, tokens = [0] * (len(STEP_SECONDS) + 1), [0] * (len(STEP_TOKENS) + 1)
    gaps[3], tokens[1], tokens[2] = 40, 5, 6
    server.engine.beat(
        steps=9, step_tokens=tokens, planned_tokens=120, token_gaps=StepTimes(gaps, 0.2)
    )
    await server.settle(lambda: server.frontend.client.state.heartbeat.steps == 9)
    found = await families(server)
    assert value(found, "vllm:iteration_tokens_total_sum") == 120
    assert value(found, "vllm:iteration_tokens_total_bucket", le="8.0") == 5
    assert value(found, "vllm:inter_token_latency_seconds_count") == 40
    assert value(found, "vllm:inter_token_latency_seconds_sum") == 0.2


async def test_endings_are_counted_by_reason_and_aborts_by_cause(server: Any) -> None:
    server.engine.manual = True
    body = {"inputs": [1, 2]}
    requests = [asyncio.create_task(server.post("/generate", body)) for _ in range(2)]
    submits = await server.engine.submitted(2)
    server.engine.finish(submits[0], "abort")
    server.engine.finish(submits[1], "error", message="boom")
    await asyncio.gather(*requests)
    gone = asyncio.create_task(server.post("/generate", body))
    await server.engine.submitted(3)
    gone.cancel()
    await server.settle(lambda: not server.frontend.num_open)
    found = await families(server)
    reasons = {"stop": 0, "length": 0, "abort": 2, "error": 1}
    for reason, count in reasons.items():
        assert value(found, "vllm:request_success_total", finished_reason=reason) == count
    for cause in ("asked", "disconnect"):
        assert value(found, "glimmer_aborted_requests_total", cause=cause) == 1


async def test_rejections_are_counted_by_reason(start: Any) -> None:
    limits = {"key_max_requests": 1, "max_body_mb": 0.01}
    server = await start(api_key=(key_digest("k"),), **limits)
    head = {"Authorization": "Bearer k"}
    server.engine.manual = True
    waiting = asyncio.create_task(server.post("/generate", {"inputs": "x"}, headers=head))
    (submit,) = await server.engine.submitted()
    for more in ({}, {"headers": head}):
        await server.post("/generate", {"inputs": "x"}, **more)
    server.engine.finish(submit, "overloaded")
    await waiting
    await server.post("/generate", {"inputs": 5}, headers=head)
    await server.post("/nowhere", {}, headers=head)
    await server.post("/generate", {"inputs": "x" * 20_000}, headers=head)
    server.frontend.client.begin_shutdown(30)
    await server.post("/generate", {"inputs": "x"}, headers=head)
    text = server.frontend.metrics.render().decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    counts = {
        one.labels["reason"]: one.value
        for one in found["glimmer_rejections"].samples
        if one.name.endswith("_total")
    }
    assert counts == {
        "unauthorized": 1,
        "key_limit": 1,
        "overloaded": 1,
        "invalid": 1,
        "not_found": 1,
        "too_large": 1,
        "unavailable": 1,
        "forbidden": 0,
        "error": 0,
    }


async def test_promtool_accepts_the_page(server: Any) -> None:
    """Names of LightLLM and vLLM break its style rules; ours must not."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: make tools")
    await server.post("/generate", {"inputs": [1, 2], "parameters": {"max_new_tokens": 2}})
    text = server.frontend.metrics.render()
    command = ["promtool", "check", "metrics"]
    done = await asyncio.to_thread(subprocess.run, command, input=text, capture_output=True)
    output = (done.stdout + done.stderr).decode()
    assert done.returncode in (0, 3), output  # 3: complaints about style alone
    foreign = ("vllm:", "lightllm_")
    assert all(line.startswith(foreign) for line in output.splitlines() if line), output


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
