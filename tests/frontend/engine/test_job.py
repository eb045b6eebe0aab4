"""What the engine says about a request becomes the right reply; the log line says what happened."""

import asyncio
import logging
from typing import Any

import aiohttp
import pytest
from glimmer.shared.messages import Finished

BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "x"},
    "/generate_stream": {"inputs": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x", "stream": True},
}
REASONS = {
    "invalid": 400,
    "overloaded": 429,
    "unavailable": 503,
    "error": 500,
    "something new": 500,
}


@pytest.mark.parametrize("path", BODIES)
async def test_a_refusal_of_the_engine_has_its_status_also_for_streams(
    server: Any, path: str
) -> None:
    for reason, status in REASONS.items():
        server.engine.refusal = Finished(
            0, reason, message="because", field="max_tokens", retry_after_s=2.5
        )
        async with server.session.post(server.url + path, json=BODIES[path]) as reply:
            assert reply.status == status
            body = await reply.json()
            assert body["error"]["message"] == body["message"] == "because"
            assert body["error"]["code"] == status
            assert ("Retry-After" in reply.headers) == (status in (429, 503))
            if status in (429, 503):
                assert reply.headers["Retry-After"] == "3"
            if status == 400:
                assert body["error"]["param"] == "max_tokens"
    server.engine.refusal = None
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200


async def test_overload_while_draining_is_a_503(server: Any) -> None:
    server.engine.manual = True
    waiting = asyncio.create_task(server.post("/generate", {"inputs": "x"}))
    submit = (await server.engine.submitted())[0]
    server.frontend.client.begin_shutdown(30)
    server.engine.finish(submit, "overloaded", retry_after_s=1.0)
    assert (await waiting)[0] == 503


async def test_one_failed_sequence_fails_the_request_and_aborts_the_others(server: Any) -> None:
    server.engine.manual = True
    body = {"inputs": "x", "parameters": {"best_of": 3}}
    waiting = asyncio.create_task(server.post("/generate", body))
    submits = await server.engine.submitted(3)
    server.engine.finish(submits[1], "error", message="boom")
    assert (await waiting)[0] == 500
    others = {submits[0].request_id, submits[2].request_id}
    await server.engine.until(lambda: set(server.engine.aborted_ids) == others)


async def test_an_abort_by_the_engine_is_a_finish_reason(server: Any) -> None:
    server.engine.manual = True
    waiting = asyncio.create_task(server.post("/generate", {"inputs": "x"}))
    submit = (await server.engine.submitted())[0]
    server.engine.tokens(submit, server.engine.output_ids[:3])
    server.engine.finish(submit, "abort", 3)
    status, reply = await waiting
    assert status == 200
    assert (reply["finish_reason"], reply["generated_text"]) == ("abort", ["the answer"])


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/chat/completions"])
async def test_a_client_that_goes_away_aborts_all_its_sequences_at_once(
    server: Any, path: str
) -> None:
    server.engine.manual = True
    body: dict[str, Any] = {**BODIES[path], "parameters": {}, "stream": True}
    count = 1
    if path != "/generate_stream":
        body, count = {**body, "n": 3, "parameters": {"best_of": 3}}, 3
    timeout = aiohttp.ClientTimeout(total=None)
    request = asyncio.create_task(
        server.session.post(server.url + path, json=body, timeout=timeout).__aenter__()
    )
    submits = await server.engine.submitted(count)
    if path != "/generate":
        server.engine.tokens(submits[0], [5])
        reply = await request
        reply.close()
    else:
        request.cancel()
    wanted = {submit.request_id for submit in submits}
    await server.engine.until(lambda: set(server.engine.aborted_ids) == wanted)
    assert len(server.engine.aborts) == 1
    await server.settle(lambda: server.frontend.num_open == 0)
    assert server.frontend.client._generations == {}


async def test_many_clients_that_go_away_cost_no_more_aborts_than_requests(server: Any) -> None:
    server.engine.manual = True
    requests = [asyncio.create_task(server.post("/generate", {"inputs": "x"})) for _ in range(60)]
    submits = await server.engine.submitted(60)
    for submit in submits[:10]:
        server.engine.tokens(submit, [5])
        server.engine.finish(submit, "length", 1)
    await asyncio.gather(*requests[:10])
    for request in requests[10:]:
        request.cancel()
    await server.engine.until(lambda: len(server.engine.aborted_ids) >= 50)
    assert set(server.engine.aborted_ids) == {s.request_id for s in submits[10:]}
    assert len(server.engine.aborted_ids) == 50


async def test_losing_the_engine_mid_stream_is_an_error_event_without_done(server: Any) -> None:
    server.engine.manual = True
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    url, session = server.url, server.session
    chat_head = asyncio.create_task(session.post(url + "/v1/chat/completions", json=body))
    plain = asyncio.create_task(server.post("/generate", {"inputs": "x"}))
    light_head = asyncio.create_task(session.post(url + "/generate_stream", json={"inputs": "x"}))
    submits = await server.engine.submitted(3)
    for submit in submits:
        server.engine.tokens(submit, server.engine.output_ids[:1])
    chat, light = await chat_head, await light_head  # both streams are open
    server.engine.lose("SIGKILL")
    data = await chat.read()
    error = (
        b'{"error":{"message":"the engine was lost: SIGKILL","type":"server_error",'
        b'"code":"stream_error"}}'
    )
    assert data.endswith(b"\n\ndata: " + error + b"\n\n")
    assert b"[DONE]" not in data
    assert (await light.read()).endswith(b"\n\ndata:" + error + b"\n\n")
    status, reply = await plain
    assert (status, reply["error"]["code"]) == (503, 503)
    async with server.session.post(server.url + "/generate", json={"inputs": "x"}) as refused:
        assert refused.status == 503
        assert refused.headers["Retry-After"] == "5"
    assert (await server.get("/readiness"))[0] == 503
    assert (await server.get("/liveness"))[0] == 200
    server.engine.manual = False
    server.engine.ready(epoch=1)
    state = server.frontend.client.state
    await server.settle(lambda: state.ready is not None)
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200
    assert len(server.engine.hellos) == 2, "it greets the new scheduler"


async def test_one_log_line_per_request_with_lightllms_names_and_no_prompt(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    headers = {"X-Request-Id": "req-1\u00e9 ", "X-Session-Id": "s"}
    secret = "Hello question answer"
    body = {"inputs": secret, "parameters": {"max_new_tokens": 3}}
    assert (await server.post("/generate", body, headers=headers))[0] == 200
    lines = [r.getMessage() for r in caplog.records if "first_token_cost" in r.getMessage()]
    assert len(lines) == 1
    for word in (
        "X-Request-Id:req-1 ",
        "X-Session-Id:s",
        "status:200",
        "finish_reason:length",
        "total_cost_time:",
        "out_token_counter:3 ",
        "mean_per_token_cost_time:",
        "prompt_token_num:5 ",
        "gpu_prompt_cache_len:3 ",
        "gpu_prompt_cache_ratio:0.6",
        "cpu_prompt_cache_len:0",
        "disk_prompt_cache_len:0",
        "mtp_avg_token_per_step:1.00",
    ):
        assert word in lines[0], word
    assert not [r for r in caplog.records if "answer" in r.getMessage()]
