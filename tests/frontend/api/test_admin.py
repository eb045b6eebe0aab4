"""The server about itself, and requests ended from outside."""

import asyncio
from typing import Any

import glimmer
import pytest
from glimmer.shared.messages import AbortNamed
from glimmer.shared.transport import AsyncReceiver, frontend_address


async def test_versions_and_settings(server: Any) -> None:
    assert await server.get("/version") == (200, f'{{"version":"{glimmer.__version__}"}}')
    for method in ("GET", "POST"):
        for path in ("/get_server_info", "/get_weight_version"):
            async with server.session.request(method, server.url + path) as reply:
                assert reply.status == 200
                body = await reply.json()
            if path == "/get_weight_version":
                assert body == {"weight_version": "default"}
            else:
                assert (body["model_name"], body["max_req_total_len"]) == ("tiny", 512)
                assert body["engine"]["num_pages"] == 100
                assert (body["state"], body["version"]) == ("ready", glimmer.__version__)


async def test_what_disturbs_others_needs_a_flag(server: Any) -> None:
    status, reply = await server.post("/flush_cache", {})
    assert status == 400
    assert "--enable_admin_api" in reply["message"]
    status, reply = await server.post("/abort_request", {"abort_all": True})
    assert (status, server.engine.flushes) == (400, 0)


async def test_the_cache_is_flushed(start: Any) -> None:
    server = await start(enable_admin_api=True)
    assert await server.post("/flush_cache", None) == (200, {"message": "Ok"})
    assert (await server.get("/flush_cache"))[0] == 200
    await server.engine.until(lambda: server.engine.flushes == 2)


@pytest.mark.parametrize("key", ["request_id", "rid"])
async def test_one_request_is_ended_by_its_name(server: Any, key: str) -> None:
    server.engine.manual = True
    body = {"inputs": [1, 2], "parameters": {"n": 2, "best_of": 2}}
    asking = [
        asyncio.create_task(server.post("/generate", body, headers={"X-Request-Id": name}))
        for name in ("mine", "other")
    ]
    submits = await server.engine.submitted(4)
    assert await server.post("/abort_request", {key: "mine"}) == (200, {"message": "Ok"})
    await server.engine.until(lambda: len(server.engine.aborted_ids) == 2)
    for submit in submits:
        reason = "abort" if submit.request_id in server.engine.aborted_ids else "length"
        server.engine.finish(submit, reason)
    replies = [reply for _, reply in await asyncio.gather(*asking)]
    assert [reply["finish_reason"] for reply in replies] == [["abort"] * 2, ["length"] * 2]


async def test_all_requests_are_ended_here_and_in_the_other_processes(start: Any) -> None:
    server = await start(enable_admin_api=True, httpserver_workers=2)
    address = frontend_address(server.engine.runtime_dir, 1)
    other = AsyncReceiver.bind(address)
    server.engine.manual = True
    asking = asyncio.create_task(server.post("/generate", {"inputs": [1]}))
    [submit] = await server.engine.submitted()
    assert (await server.post("/abort_request", {"abort_all": True}))[0] == 200
    async with asyncio.timeout(10):
        assert await other.receive_async() == [AbortNamed("")]
    other.close()
    await server.engine.until(lambda: server.engine.aborted_ids == [submit.request_id])
    server.engine.finish(submit, "abort")
    assert (await asking)[1]["finish_reason"] == "abort"


async def test_another_process_ends_requests_of_this_one(server: Any) -> None:
    server.engine.manual = True
    asking = asyncio.create_task(
        server.post("/generate", {"inputs": [1]}, headers={"X-Request-Id": "mine"})
    )
    [submit] = await server.engine.submitted()
    server.engine.send(AbortNamed("mine"))
    await server.engine.until(lambda: server.engine.aborted_ids == [submit.request_id])
    server.engine.finish(submit, "abort")
    assert (await asking)[0] == 200


async def test_what_there_is_not(server: Any) -> None:
    for path in ("/profiler_start", "/profiler_stop"):
        status, text = await server.get(path)
        assert (status, "profiler" in text) == (400, True)
    status, reply = await server.post("/get_score", {"chat": []})
    assert (status, reply["error"]["code"]) == (400, 400)
    for body in ({}, {"request_id": ""}, {"request_id": [1]}, {"abort_all": 3}):
        status, reply = await server.post("/abort_request", body)
        assert status == 400, body
