"""The process: when it listens, what it refuses before reading, how it drains and stops."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from glimmer.frontend import app
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ModelError, PortError
from glimmer.shared.lifecycle import Child
from glimmer.shared.messages import LauncherBeat, Progress, Ready, Shutdown
from glimmer.shared.secrets import key_digest
from glimmer.shared.transport import Receiver, Sender, launcher_address
from yarl import URL


async def test_paths_may_have_slashes_too_many(server: Any) -> None:
    for path in ("/v1/models/", "/v1//models", "//v1/models", "/v1/models/tiny/", "/health/?a=//"):
        async with server.session.get(URL(server.url + path, encoded=True)) as reply:
            assert reply.status == 200, path
    for path in ("/v1/messages/", "/v1//messages", "//v1/messages//"):
        status, body = await server.post(path, {"messages": []})
        assert (status, body["type"]) == (400, "error"), "also errors are those of the route"
    for path in ("/", "/?x=1"):
        assert (await server.post(path, {"inputs": "x"}))[0] == 200
    assert (await server.post("//", {"inputs": "x"}))[0] == 200
    assert (await server.get("/v1/nothing//"))[0] == 404


async def test_no_slash_opens_a_route_of_admins(start: Any) -> None:
    keys = {"api_key": (key_digest("sk-user"),), "admin_api_key": (key_digest("sk-admin"),)}
    server = await start(**keys)
    headers = {"Authorization": "Bearer sk-user"}
    for path in ("/flush_cache", "/flush_cache/", "//flush_cache"):
        async with server.session.post(URL(server.url + path, encoded=True)) as reply:
            assert reply.status == 401
        async with server.session.post(
            URL(server.url + path, encoded=True), headers=headers
        ) as reply:
            assert reply.status == 403


async def test_unknown_routes_and_methods_have_the_error_envelope(server: Any) -> None:
    async with server.session.get(server.url + "/nope") as reply:
        body = await reply.json()
        assert (reply.status, body["error"]["type"]) == (404, "NotFoundError")
        assert body["error"]["code"] == 404
        assert body["message"]
    async with server.session.get(server.url + "/generate") as reply:
        assert reply.status == 405
        assert reply.headers["Allow"] == "POST"
        body = await reply.json()
        assert body["error"]["code"] == 405
        assert body["message"] == "GET /generate: Method Not Allowed"


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions", "/"])
async def test_malformed_json_is_a_400(server: Any, path: str) -> None:
    for data in (b"", b"{", b"\xff", b'{"x": ' + b"[" * 100_000, b'{"inputs": NaN}'):
        async with server.session.post(server.url + path, data=data) as reply:
            assert reply.status == 400, data[:20]
            assert "JSON" in (await reply.json())["message"]
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200


async def test_an_expectation_that_nobody_knows_is_a_417(server: Any) -> None:
    head = await server.exchange(
        b"POST /generate HTTP/1.1\r\nHost: x\r\nExpect: the-worst\r\nContent-Length: 2\r\n\r\n{}",
    )
    assert head.startswith(b"HTTP/1.1 417")


async def test_bytes_that_are_no_text_are_refused_like_any_other(server: Any) -> None:
    for head in (
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Encoding: \xff\xe9\r\n"
        b"Content-Length: 2\r\n\r\n{}",
    ):
        assert (await server.exchange(head)).split()[1] in (b"400", b"404", b"415")


async def test_bytes_that_are_not_http_leave_no_traceback(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for data in (b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02"):
        assert (await server.exchange(data)).startswith(b"HTTP/1.0 400")
    assert caplog.text == ""


async def test_request_ids_come_back_also_on_streams_and_errors(server: Any) -> None:
    headers = {"X-Request-Id": "mine-1"}
    for path, body in (
        ("/generate", {"inputs": "x"}),
        ("/generate_stream", {"inputs": "x"}),
        ("/generate", {}),
    ):
        async with server.session.post(server.url + path, json=body, headers=headers) as reply:
            assert reply.headers["X-Request-Id"] == "mine-1"
            assert reply.headers["Server"] == "glimmer"
    async with server.session.get(server.url + "/health") as reply:
        assert len(reply.headers["X-Request-Id"]) == 32


async def test_our_own_bugs_are_a_500_with_the_request_id(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.frontend.client, "submit", fail)
    headers = {"X-Request-Id": "abc"}
    status, reply = await server.post("/generate", {"inputs": "x"}, headers=headers)
    assert (status, reply["error"]["type"]) == (500, "InternalServerError")
    assert "abc" in reply["message"]
    assert "secret" not in json.dumps(reply)
    monkeypatch.undo()
    assert (await server.post("/generate", {"inputs": "x"}))[0] == 200


async def test_no_route_asks_for_a_key_and_none_is_forgotten(server: Any) -> None:
    routes = {r.resource.canonical for r in app.create_app(server.frontend).router.routes()}
    assert routes == {
        *("/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions"),
        *("/v1/models", "/tokens", "/token_load", "/get_model_name", "/metrics"),
        *("/health", "/healthz", "/liveness", "/readiness", "/ping"),
        *("/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/models/{id}"),
        *(
            "/tokenize",
            "/detokenize",
            "/tokenizer_info",
            "/version",
            "/get_server_info",
            "/get_weight_version",
        ),
        *("/flush_cache", "/abort_request", "/get_score", "/profiler_start", "/profiler_stop"),
        *("/openapi.json", "/docs"),
    }


class Process:
    """`serve` as the launcher runs it, in this event loop."""

    def __init__(self, directory: Path, model: Path, engine: Any, **changes: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        values = {"model_dir": str(model), "port": port, "max_req_total_len": 512, **changes}
        self.config = ServeConfig(**values)
        self.url = f"http://127.0.0.1:{self.config.port}"
        self.engine = engine
        self.inbox = Receiver.bind(launcher_address(str(directory)))
        self.launcher = Sender.connect(launcher_address(str(directory)))
        self.directory = directory
        self.seen: list[Any] = []

    def start(
        self, listen_fd: int | None = None, metrics_fd: int | None = None
    ) -> "asyncio.Task[None]":
        where = (str(self.directory), listen_fd)
        child = Child("frontend", 0, 0, *where, self.config, self.launcher, metrics_fd)
        return asyncio.create_task(app.serve(child))

    async def heard(self, wanted: Callable[[Any], bool]) -> None:
        async with asyncio.timeout(20):
            while not any(wanted(message) for message in self.seen):
                self.seen += self.inbox.receive(0)
                await asyncio.sleep(0.01)

    async def get(self, path: str) -> int:
        async with aiohttp.ClientSession() as session:
            try:
                async with session.get(self.url + path) as reply:
                    return reply.status
            except aiohttp.ClientConnectorError:
                return 0

    async def post(self, path: str, body: Any) -> tuple[int, bytes]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.url + path, json=body) as reply,
        ):
            return reply.status, await reply.read()


@pytest.fixture
async def process(
    tiny_model: Path, tmp_path: Path, fake_engine: Any
) -> AsyncIterator[Callable[..., Process]]:
    made: list[Process] = []

    def make(**changes: Any) -> Process:
        made.append(Process(tmp_path, tiny_model, fake_engine, **changes))
        return made[-1]

    yield make
    for one in made:
        one.inbox.close()
        one.launcher.close()


def is_ready(message: Any) -> bool:
    return isinstance(message, Ready) and message.role == "frontend"


async def waits_for_engine(process: Process) -> None:
    await process.heard(lambda m: isinstance(m, Progress) and "engine" in m.stage)


@pytest.mark.parametrize("inherited", [False, True])
async def test_the_port_opens_when_the_engine_is_ready_and_closes_after_the_drain(
    process: Callable[..., Process], inherited: bool
) -> None:
    one = process()
    listen_fd = None
    if inherited:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", one.config.port))
            listen_fd = os.dup(bound.fileno())
    serving = one.start(listen_fd)
    await waits_for_engine(one)
    assert await one.get("/liveness") == 0, "refused before ready"
    one.engine.ready(epoch=7)
    await one.heard(is_ready)
    assert next(m for m in one.seen if is_ready(m)).epoch == 7
    assert await one.get("/readiness") == 200
    assert (await one.post("/generate", {"inputs": "x"}))[0] == 200
    one.engine.manual = True
    stream = asyncio.create_task(one.post("/generate_stream", {"inputs": "x"}))
    submit = (await one.engine.submitted(2))[1]
    one.engine.send(Shutdown(30.0))
    async with asyncio.timeout(10):
        while await one.get("/readiness") == 200:
            await asyncio.sleep(0.01)
    assert await one.get("/readiness") == 0, "refused"
    assert not serving.done()
    one.engine.tokens(submit, [275])
    one.engine.finish(submit, "stop", 1)
    assert (await stream)[0] == 200
    await asyncio.wait_for(serving, 10)
    assert await one.get("/liveness") == 0


async def test_a_server_that_leaves_is_not_ready_and_closes_connections_but_serves(
    process: Callable[..., Process],
) -> None:
    one = process()
    serving = one.start()
    await waits_for_engine(one)
    one.engine.ready()
    one.engine.manual = True
    await one.heard(is_ready)
    address = ("127.0.0.1", one.config.port)
    idle, busy, late = [await asyncio.open_connection(*address) for _ in range(3)]
    for connection in (idle, busy):
        assert b"Connection: close" not in await ask(connection, b"GET /liveness")
    late[1].write(b"GET /liveness HTTP/1.1\r\n")
    streamed = asyncio.create_task(ask(busy, b"POST /generate_stream", b'{"inputs": "x"}'))
    submit = (await one.engine.submitted())[0]
    one.engine.tokens(submit, [275])
    assert (await streamed).startswith(b"HTTP/1.1 200")
    one.engine.send(LauncherBeat(is_leaving=True))
    async with asyncio.timeout(10):
        while await one.get("/readiness") == 200:
            await asyncio.sleep(0.01)
    fresh = await asyncio.open_connection(*address)
    one.engine.manual = False
    head = await ask(fresh, b"POST /generate", b'{"inputs": "x"}')
    assert head.startswith(b"HTTP/1.1 200")
    assert b"Connection: close" in head
    await asyncio.wait_for(fresh[0].read(), 10)  # to its end
    one.engine.send(Shutdown(30.0))
    assert await asyncio.wait_for(idle[0].read(), 10) == b"", "closed"
    late[1].write(b"Host: x\r\n\r\n")
    head = await late[0].read()
    assert head.startswith(b"HTTP/1.1 200"), "a probe needs no engine"
    assert b"Connection: close" in head
    one.engine.finish(submit, "stop", 1)
    assert (await asyncio.wait_for(busy[0].read(), 10)).endswith(b"0\r\n\r\n"), "whole, then closed"
    await asyncio.wait_for(serving, 10)
    for _, writer in (idle, busy, late, fresh):
        writer.close()


async def test_a_request_on_an_open_connection_is_refused_while_draining(
    process: Callable[..., Process],
) -> None:
    one = process()
    serving = one.start()
    await waits_for_engine(one)
    one.engine.ready()
    one.engine.manual = True
    await one.heard(is_ready)
    running = asyncio.create_task(one.post("/generate", {"inputs": "x"}))
    submit = (await one.engine.submitted())[0]
    connection = await asyncio.open_connection("127.0.0.1", one.config.port)
    connection[1].write(b"POST /generate HTTP/1.1\r\n")
    assert await one.get("/liveness") == 200, "the head's beginning has arrived, too"
    one.engine.send(Shutdown(30.0))
    async with asyncio.timeout(10):
        while await one.get("/liveness") != 0:
            await asyncio.sleep(0.01)
    connection[1].write(b'Host: x\r\nContent-Length: 15\r\n\r\n{"inputs": "x"}')
    reply = await asyncio.wait_for(connection[0].read(), 10)
    assert reply.startswith(b"HTTP/1.1 503")
    for part in (b"draining", b"Connection: close", b"Retry-After: 5"):
        assert part in reply
    one.engine.tokens(submit, [275])
    one.engine.finish(submit, "stop", 1)
    assert (await running)[0] == 200
    await asyncio.wait_for(serving, 10)
    connection[1].close()


async def ask(connection: Any, line: bytes, body: bytes = b"") -> bytes:
    """The head of the reply to a request on an open connection. The body of a probe is read, too,
    so that the connection is idle then."""
    reader, writer = connection
    writer.write(line + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    head: bytes = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    if line.startswith(b"GET"):
        length = next(h for h in head.split(b"\r\n") if h.startswith(b"Content-Length"))
        await reader.readexactly(int(length.split()[1]))
    return head


async def test_when_the_time_to_drain_is_over_streams_end_with_an_error(
    process: Callable[..., Process],
) -> None:
    one = process()
    serving = one.start()
    await waits_for_engine(one)
    one.engine.manual = True
    one.engine.ready()
    await one.heard(is_ready)
    body = {"prompt": "x", "stream": True}
    stream = asyncio.create_task(one.post("/v1/completions", body))
    plain = asyncio.create_task(one.post("/generate", {"inputs": "x"}))
    submits = await one.engine.submitted(2)
    for submit in submits:
        one.engine.tokens(submit, [275])
    one.engine.send(Shutdown(60.0))
    one.engine.send(Shutdown(0.05))
    data = (await stream)[1]
    assert b"the server is shutting down" in data
    assert b"[DONE]" not in data
    assert (await plain)[0] == 503
    await asyncio.wait_for(serving, 10)


async def test_shutdown_before_the_engine_is_ready(process: Callable[..., Process]) -> None:
    one = process()
    serving = one.start()
    await waits_for_engine(one)
    one.engine.send(Shutdown(0.0))
    await asyncio.wait_for(serving, 10)
    assert not any(is_ready(message) for message in one.seen)


async def test_a_port_in_use_is_known_before_anything_is_loaded(
    process: Callable[..., Process],
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        one = process(port=other.getsockname()[1])
        with pytest.raises(PortError, match=str(one.config.port)):
            await one.start()


async def test_a_bad_model_directory_is_a_start_error(
    process: Callable[..., Process], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        await process(model_dir=str(tmp_path)).start()


async def test_sigterm_drains(process: Callable[..., Process]) -> None:
    one = process(drain_timeout_s=0.0)
    serving = one.start()
    await waits_for_engine(one)
    one.engine.ready()
    await one.heard(is_ready)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(serving, 10)


def probe(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    with contextlib.closing(connection):
        reply = connection.getresponse()
        return reply.status, reply.read()


async def test_a_port_of_its_own_answers_probes_also_while_the_event_loop_hangs(
    process: Callable[..., Process],
) -> None:
    one = process()
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    port = bound.getsockname()[1]
    serving = one.start(None, bound.detach())
    await waits_for_engine(one)
    one.engine.ready()
    one.engine.beat()
    await one.heard(is_ready)
    for path in ("/health", "/readiness", "/liveness", "/metrics"):
        assert (await asyncio.to_thread(probe, port, path))[0] == 200
    assert (await asyncio.to_thread(probe, port, "/generate"))[0] == 404
    answers: list[tuple[int, bytes]] = []
    prober = threading.Thread(target=lambda: answers.extend(probe_until_dead(port)))
    prober.start()
    while prober.is_alive():
        time.sleep(0.1)  # the event loop hangs
    assert answers[0][0] == 200
    assert answers[-1][0] == 503
    assert b"the event loop has not run for" in answers[-1][1]
    one.engine.send(Shutdown(0.0))
    await asyncio.wait_for(serving, 20)


def probe_until_dead(port: int) -> list[tuple[int, bytes]]:
    """Ask for liveness until it is denied; all answers."""
    answers = [probe(port, "/liveness")]
    while answers[-1][0] == 200:
        time.sleep(0.2)
        answers.append(probe(port, "/liveness"))
    return answers


async def test_connections_leave_file_descriptors_to_the_server(
    process: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = process()
    serving = one.start()
    await waits_for_engine(one)
    num_open = len(os.listdir("/proc/self/fd"))
    limits = (num_open + app._SPARE_FILES + 8, 1 << 20)
    monkeypatch.setattr("resource.getrlimit", lambda _: limits)
    one.engine.ready()
    await one.heard(is_ready)
    address = ("127.0.0.1", one.config.port)
    held = [await asyncio.open_connection(*address) for _ in range(30)]
    reader, _ = held[-1]
    assert (await reader.read()).startswith(b"HTTP/1.1 503")
    for _, writer in held:
        writer.close()
    async with asyncio.timeout(10):
        while await one.get("/liveness") != 200:
            await asyncio.sleep(0.1)
    one.engine.send(Shutdown(0.0))
    await asyncio.wait_for(serving, 20)
