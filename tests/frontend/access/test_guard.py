"""Who gets in: every route is asked without a key, with one, and with an admin's."""

import asyncio
import json
from typing import Any

import anthropic
import openai
import pytest
from glimmer.frontend import app
from glimmer.frontend.access.guard import PUBLIC_PATHS
from glimmer.shared.messages import AbortNamed
from glimmer.shared.secrets import key_digest
from glimmer.shared.transport import AsyncReceiver, frontend_address

KEYS = {
    "api_key": (key_digest("sk-one"), key_digest("sk-two")),
    "admin_api_key": (key_digest("sk-admin"),),
}
PROBES = {"/health", "/healthz", "/ping", "/liveness", "/readiness"}
ADMINS_ONLY = {"/metrics", "/flush_cache"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(server: Any, method: str, path: str, **headers: str) -> tuple[int, Any, Any]:
    path = path.replace("{id}", "tiny")
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with server.session.request(
        method, server.url + path, headers=names, json={}, allow_redirects=False
    ) as reply:
        data = await reply.read()
        body = json.loads(data) if data and reply.content_type == "application/json" else None
        return reply.status, body, reply.headers


def all_of(server: Any) -> list[tuple[str, str]]:
    routes = app.create_app(server.frontend).router.routes()
    pairs = [(route.method, route.resource.canonical) for route in routes]
    assert len(pairs) > 40
    return [*pairs, ("GET", "/none"), ("PUT", "/generate"), ("DELETE", "/health"), ("OPTIONS", "/")]


async def test_every_route_but_the_probes_needs_a_key(start: Any) -> None:
    server = await start(**KEYS)
    for method, path in all_of(server):
        for headers in ({}, {"x_api_key": "sk-wrong"}, bearer("")):
            status, body, heads = await ask(server, method, path, **headers)
            if path in PROBES and method not in ("PUT", "DELETE"):
                assert status == 200, (method, path)
                continue
            assert status == 401, (method, path)
            assert heads["WWW-Authenticate"] == "Bearer"
            if method == "HEAD":
                continue
            if path.startswith("/v1/messages"):
                assert body["type"] == "error"
                assert body["error"]["type"] == "authentication_error"
            else:
                assert body["error"]["type"] == "AuthenticationError"
                assert body["error"]["code"] == 401
                assert "key" in body["message"]
    assert not server.engine.submits
    assert set(PUBLIC_PATHS) == PROBES


async def test_with_a_key_all_but_the_admins_routes_are_open(start: Any) -> None:
    server = await start(**KEYS)
    for method, path in all_of(server):
        for headers in ({"x_api_key": "sk-two"}, bearer("sk-one")):
            status, body, _ = await ask(server, method, path, **headers)
            assert (status == 403) == (path in ADMINS_ONLY), (method, path, status)
            assert status not in (401, 500)
            if status == 403 and method != "HEAD":
                assert body["error"]["type"] == "PermissionDeniedError"
        status, _, _ = await ask(server, method, path, **bearer("sk-admin"))
        assert status not in (401, 403, 500), (method, path)
    assert server.engine.flushes == 3, "GET, HEAD and POST"


async def test_a_file_without_keys_lets_nobody_in(start: Any, tmp_path: Any) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    server = await start(api_key_file=str(tmp_path / "keys"))
    assert (await ask(server, "GET", "/v1/models"))[0] == 401
    assert (await ask(server, "GET", "/health"))[0] == 200


async def test_the_official_clients_send_their_keys(start: Any) -> None:
    server = await start(**KEYS)
    message: Any = [{"role": "user", "content": "x"}]
    for key, kind in (("sk-one", None), ("sk-no", openai.AuthenticationError)):
        async with openai.AsyncOpenAI(
            base_url=server.url + "/v1", api_key=key, max_retries=0
        ) as client:
            asking = client.chat.completions.create(model="tiny", messages=message, max_tokens=1)
            if kind is None:
                assert (await asking).usage is not None
            else:
                with pytest.raises(kind):
                    await asking
    for key, error in (("sk-one", None), ("sk-no", anthropic.AuthenticationError)):
        async with anthropic.AsyncAnthropic(
            base_url=server.url, api_key=key, max_retries=0
        ) as claude:
            writing = claude.messages.create(model="tiny", messages=message, max_tokens=1)
            if error is None:
                assert (await writing).usage.output_tokens == 1
            else:
                with pytest.raises(error):
                    await writing


async def test_paths_are_for_admins_and_digests_for_nobody(start: Any, tmp_path: Any) -> None:
    (tmp_path / "keys").write_text("")
    server = await start(**KEYS, api_key_file=str(tmp_path / "keys"))
    private = {"model_dir", "runtime_dir", "chat_template", "api_key_file", "mtp_draft_model_dir"}
    for key in ("sk-one", "sk-admin"):
        status, body, _ = await ask(server, "GET", "/get_server_info", **bearer(key))
        assert (status, body["model_name"]) == (200, "tiny")
        assert ("model_dir" in body) == (key == "sk-admin")
        assert private.isdisjoint(body) or key == "sk-admin"
        assert not {"api_key", "admin_api_key"} & body.keys()
        assert key_digest("sk-one") not in json.dumps(body)
        assert (str(tmp_path) in json.dumps(body)) == (key == "sk-admin")


async def test_a_server_without_keys_tells_no_path(server: Any) -> None:
    status, body, _ = await ask(server, "GET", "/get_server_info")
    assert status == 200
    assert "max_req_total_len" in body
    for value in body.values():
        assert not str(value).startswith("/"), value


async def test_only_the_owner_and_an_admin_end_a_request(start: Any) -> None:
    server = await start(**KEYS)
    server.engine.manual = True
    asking = []
    for key in ("sk-one", "sk-two"):
        headers = bearer(key) | {"X-Request-Id": "same"}
        asking.append(
            asyncio.create_task(server.post("/generate", {"inputs": [1]}, headers=headers))
        )
        await server.engine.submitted(len(asking))
    one, two = server.engine.submits
    assert (one.tenant, two.tenant) == ("api_key#1", "api_key#2")
    abort = {"request_id": "same"}
    assert (await server.post("/abort_request", abort, headers=bearer("sk-two")))[0] == 200
    await server.engine.until(lambda: server.engine.aborted_ids == [two.request_id])
    server.engine.finish(two, "abort")
    everything = {"abort_all": True}
    assert (await server.post("/abort_request", everything, headers=bearer("sk-two")))[0] == 200
    assert (await server.post("/abort_request", everything))[0] == 401
    assert (await server.post("/abort_request", everything, headers=bearer("sk-admin")))[0] == 200
    # An abort may come again for a request whose end is on its way to the frontend.
    await server.engine.until(lambda: one.request_id in server.engine.aborted_ids)
    assert server.engine.aborted_ids[-1] == one.request_id, "by the admin, who came last"
    server.engine.finish(one, "abort")
    assert [status for status, _ in await asyncio.gather(*asking)] == [200, 200]


async def test_other_processes_hear_whose_requests_to_end(start: Any) -> None:
    server = await start(**KEYS, httpserver_workers=2)
    other = AsyncReceiver.bind(frontend_address(server.engine.runtime_dir, 1))
    heard: list[Any] = []
    for key, body in (("sk-two", {"rid": "x"}), ("sk-one", {"abort_all": 1}), ("sk-admin", {})):
        full = {"request_id": "y", **body}
        if body.get("abort_all"):
            full = {"abort_all": True}
        assert (await server.post("/abort_request", full, headers=bearer(key)))[0] == 200
        async with asyncio.timeout(10):
            heard += await other.receive_async()
    assert heard == [
        AbortNamed("y", "api_key#2"),
        AbortNamed("", "api_key#1"),
        AbortNamed("y", None),
    ]
    other.close()
    server.engine.manual = True
    headers = bearer("sk-one") | {"X-Request-Id": "mine"}
    asking = asyncio.create_task(server.post("/generate", {"inputs": [1]}, headers=headers))
    [submit] = await server.engine.submitted()
    server.engine.send(AbortNamed("mine", "api_key#2"))
    server.engine.send(AbortNamed("", "api_key#1"))
    await server.engine.until(lambda: server.engine.aborted_ids == [submit.request_id])
    server.engine.finish(submit, "abort")
    assert (await asking)[0] == 200


@pytest.mark.parametrize("shared", [False, True])
async def test_prefixes_are_shared_within_a_key_only(start: Any, shared: bool) -> None:
    server = await start(**KEYS, shared_prefix_cache=shared)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    seen = []
    for key, salt in (("sk-one", "s"), ("sk-two", "s"), ("sk-two", ""), ("sk-one", "api_key#2:s")):
        status, reply = await server.post(
            "/v1/chat/completions", body | {"cache_salt": salt}, headers=bearer(key)
        )
        assert status == 200
        seen.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
    detailed = {"inputs": [1] * 9, "parameters": {"return_details": True}}
    _, reply = await server.post("/generate", detailed, headers=bearer("sk-one"))
    assert reply["tokens"][0]["prompt_cache_len"] == (0 if shared else 3)
    salts = [submit.cache_salt for submit in server.engine.submits][:4]
    if shared:
        assert salts == ["s", "s", "", "api_key#2:s"]
        assert seen == [0, 0, 0, 0], "they may be those of others"
    else:
        assert salts == ["api_key#1:s", "api_key#2:s", "api_key#2:", "api_key#1:api_key#2:s"]
        assert seen == [3, 3, 3, 3]


async def test_without_keys_requests_are_nobodys(server: Any) -> None:
    server.reset()
    body = {"prompt": "x", "cache_salt": "s", "max_tokens": 1}
    status, _ = await server.post("/v1/completions", body, headers=bearer("ignored"))
    assert status == 200
    [submit] = server.engine.submits
    assert (submit.tenant, submit.cache_salt) == ("", "s")


async def test_strangers_do_not_learn_that_the_server_is_full(start: Any) -> None:
    server = await start(**KEYS, max_queued_requests=1, running_max_req_size=1)
    server.engine.manual = True
    ours = [
        asyncio.create_task(server.post("/generate", {"inputs": "x"}, headers=bearer("sk-one")))
        for _ in range(2)
    ]
    submits = await server.engine.submitted(2)
    for header, status in (
        (b"A: b", b"401"),
        (b"x-api-key: sk-wrong", b"401"),
        (b"Authorization: Bearer \xff\xfe", b"401"),
        (b"X-API-KEY: sk-two", b"429"),
        (b"authorization:  Bearer sk-two ", b"429"),
    ):
        body = b"POST /generate HTTP/1.1\r\nHost: x\r\n" + header
        head = await server.exchange(body + b"\r\nContent-Length: 2\r\n\r\n{}")
        assert head.split()[1] == status, header
        assert (b"WWW-Authenticate: Bearer" in head) == (status == b"401")
    for submit in submits:
        server.engine.finish(submit, "stop")
    assert [status for status, _ in await asyncio.gather(*ours)] == [200, 200]


async def test_browsers_are_asked_for_a_key_by_a_page_that_tells_nothing(start: Any) -> None:
    server = await start(**KEYS)
    for path in ("/docs", "/"):
        async with server.session.get(server.url + path, headers={"Accept": "text/html"}) as reply:
            text = await reply.text()
            assert (reply.status, reply.content_type) == (401, "text/html")
        assert '<input type="password"' in text
        assert not any(word in text for word in ("/v1/", "glimmer", "tiny", app.__name__))
    headers = {"Accept": "text/html", **bearer("sk-one")}
    async with server.session.get(server.url + "/docs", headers=headers) as reply:
        assert reply.status == 200
        assert "/v1/chat/completions" in await reply.text()
