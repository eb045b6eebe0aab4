"""Probes tell three truths from memory; small routes have LightLLM's shapes."""

import asyncio
import json
from typing import Any

import pytest
from glimmer.shared.messages import LauncherBeat, PeerLost


async def test_before_the_engine_is_ready_only_liveness_is_true(start: Any) -> None:
    server = await start(ready=False)
    assert await server.get("/liveness") == (200, '{"status":"ok"}')
    assert await server.get("/readiness") == (503, '{"status":"starting"}')
    assert await server.get("/health") == (503, '{"message":"Error"}')
    status, reply = await server.post("/generate", {"inputs": "x"})
    assert (status, reply["error"]["type"]) == (503, "ServiceUnavailableError")
    server.engine.ready()
    server.engine.beat()
    await server.settle(lambda: server.frontend.client.state.heartbeat is not None)
    assert (await server.get("/readiness"))[0] == 200
    assert await server.get("/health") == (200, '{"message":"Ok"}')
    assert await server.get("/healthz") == (200, '{"message":"Ok"}')


async def test_readiness_says_why_not(server: Any) -> None:
    server.engine.beat(worker_ready=False)
    state = server.frontend.client.state
    await server.settle(lambda: not state.heartbeat.worker_ready)
    assert await server.get("/readiness") == (503, '{"status":"engine restarting"}')
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200, "it may wait in the queue"
    server.frontend.client.begin_shutdown(30)
    assert await server.get("/readiness") == (503, '{"status":"draining"}')
    assert (await server.get("/liveness"))[0] == 200


async def test_health_fails_when_work_stalls_and_when_heartbeats_stop(start: Any) -> None:
    server = await start(health_timeout_s=5.0)
    state = server.frontend.client.state
    assert (await server.get("/health"))[0] == 200
    state.progress_at -= 6
    assert (await server.get("/health"))[0] == 503
    server.engine.beat(steps=2, num_running=1)
    await server.settle(lambda: state.heartbeat.steps == 2)
    assert (await server.get("/health"))[0] == 200
    state.heartbeat_at -= 11
    assert (await server.get("/health"))[0] == 503


async def test_readiness_knows_progress(server: Any) -> None:
    state = server.frontend.client.state
    server.engine.beat(stall="step 3 takes long")
    await server.settle(lambda: bool(state.heartbeat.stall))
    assert await server.get("/readiness") == (503, '{"status":"engine stalled: step 3 takes long"}')
    assert 'glimmer_ready{model_name="tiny"} 0.0' in (await server.get("/metrics"))[1]
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200, "it may be over soon"
    server.engine.beat()
    await server.settle(lambda: not state.heartbeat.stall)
    assert (await server.get("/readiness"))[0] == 200
    state.heartbeat_at -= 4
    assert await server.get("/readiness") == (503, '{"status":"engine silent for 4 s"}')


async def test_a_silent_launcher_fails_health_and_restarts_are_counted(server: Any) -> None:
    state = server.frontend.client.state
    server.engine.send(LauncherBeat(3, 2, 0, 17))
    server.engine.beat(dropped_messages=5)
    await server.settle(lambda: state.launcher is not None)
    await server.settle(lambda: state.heartbeat.dropped_messages == 5)
    assert (await server.get("/health"))[0] == 200
    text = (await server.get("/metrics"))[1]
    for line in (
        'glimmer_restarts_total{model_name="tiny",unit="engine"} 3.0',
        'glimmer_restarts_total{model_name="tiny",unit="frontend"} 2.0',
        'glimmer_log_lines_dropped_total{model_name="tiny",process="launcher"} 17.0',
        'glimmer_messages_dropped_total{model_name="tiny",process="scheduler"} 5.0',
    ):
        assert line in text
    state.launcher_at -= 11
    assert (await server.get("/health"))[0] == 503
    assert (await server.get("/readiness"))[0] == 200, "it still serves"


async def test_output_that_was_dropped_ends_its_requests(server: Any) -> None:
    server.engine.manual = True
    request = asyncio.create_task(server.post("/generate", {"inputs": "x"}))
    await server.engine.submitted(1)
    server.engine.send(PeerLost("frontend", 0, "it did not read"))
    status, reply = await request
    assert status == 503
    assert "output was lost: it did not read" in reply["message"]


async def test_probes_answer_while_requests_are_open(server: Any) -> None:
    server.engine.manual = True
    requests = [asyncio.create_task(server.post("/generate", {"inputs": "x"})) for _ in range(30)]
    submits = await server.engine.submitted(30)
    for path in ("/health", "/readiness", "/liveness", "/metrics"):
        assert (await server.get(path))[0] == 200
    for submit in submits:
        server.engine.finish(submit, "length")
    await asyncio.gather(*requests)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("HEAD", "/health"),
        ("POST", "/liveness"),
        ("POST", "/readiness"),
        ("POST", "/get_model_name"),
        ("GET", "/get_model_name"),
        ("GET", "/token_load"),
    ],
)
async def test_methods_that_lightllm_clients_use(server: Any, method: str, path: str) -> None:
    async with server.session.request(method, server.url + path) as reply:
        assert reply.status == 200
        assert reply.content_type == "application/json"


async def test_names_and_loads(start: Any) -> None:
    server = await start(model_name="glm", model_owner="us")
    assert json.loads((await server.get("/get_model_name"))[1]) == {"model_name": "glm"}
    listed = json.loads((await server.get("/v1/models"))[1])
    created = server.frontend.created
    assert listed == {
        "object": "list",
        "data": [
            {
                "id": "glm",
                "object": "model",
                "created": created,
                "owned_by": "us",
                "max_model_len": 512,
            }
        ],
    }
    assert json.loads((await server.get("/token_load"))[1]) == {
        "current_load": 0.25,
        "logical_max_load": 0.0,
        "dynamic_max_load": 0.5,
    }


async def test_one_model_by_its_name(start: Any) -> None:
    server = await start(model_name="zai/glm")
    listed = json.loads((await server.get("/v1/models"))[1])["data"][0]
    status, text = await server.get("/v1/models/zai/glm")
    assert (status, json.loads(text)) == (200, listed)
    status, text = await server.get("/v1/models/gpt-9")
    error = json.loads(text)["error"]
    assert (status, error["type"], error["param"]) == (404, "NotFoundError", "model")


async def test_ping_is_health(server: Any) -> None:
    assert await server.get("/ping") == await server.get("/health")
    assert (await server.post("/ping", {}))[0] == 200
