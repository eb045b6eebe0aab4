"""The HTTP application and its process: load, wait for the engine, listen, drain.

Routes are in `routes.py`. One middleware turns every error into the error body of its interface
(`wire/errors.py`). The port opens when the scheduler says that the engine is ready.
"""

import asyncio
import contextlib
import html
import logging
import math
import os
import re
import resource
import secrets
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawRequestMessage
from yarl import URL

from ..shared.config import ServeConfig
from ..shared.errors import (
    EngineError,
    HttpError,
    NotFoundError,
    PortError,
    RequestError,
    TooLargeError,
)
from ..shared.fingerprint import check_unchanged
from ..shared.lifecycle import Child
from ..shared.log import dropped_lines
from ..shared.log_format import request_fields
from ..shared.messages import Progress, Ready, Reloaded
from ..shared.model_spec import load_model_spec
from .access.guard import Access
from .access.reload import keep_current
from .access.shared_usage import UsageTable
from .access.tls import Tls
from .access_log import log_access
from .api.docs_page import HOST, KEY_PAGE, docs_page
from .api.openapi import openapi
from .context import CONTEXT, FRONTEND, Frontend, RequestContext, clean_id, clean_names
from .engine.client import LAUNCHER_LIMIT_S, EngineClient
from .engine.metrics import Metrics
from .engine.metrics_push import push_forever
from .engine.params import ModelFacts, load_defaults
from .engine.totals import ServerTotals
from .grammar.checker import GrammarChecker
from .probes import start_probes
from .refusals import Refusals
from .routes import Generating, Handler, Route, all_routes
from .text.tokenizer import Tokenizer
from .wire.body import encode_json, json_response, read_body
from .wire.connection import MAX_HEAD, Connection, Connections, Expects
from .wire.errors import error_body, message_for
from .wire.listener import Listener
from .wire.shape import BodyLimits

if TYPE_CHECKING:
    from .engine.traces import Tracer

_SEND_BUFFER = 256 << 10  # bytes the kernel holds for a client that does not read
_SPARE_FILES = 20  # file descriptors that connections leave to replace helpers and links
_BEAT_S = 1.0
_END_S = 2.0  # for the last events, when draining has timed out
logger = logging.getLogger(__name__)


def create_app(frontend: Frontend) -> web.Application:
    """The routes over one Frontend, whose client must be running."""
    limits = frontend.body_limits
    guards = [frontend.access.guard()] if frontend.access else []
    loggers = [log_access] if frontend.config.access_log else []
    middlewares = [*loggers, _middleware, *guards]
    app = web.Application(middlewares=middlewares, client_max_size=limits.num_bytes)
    app[FRONTEND] = frontend
    app.on_response_prepare.append(_add_headers)
    if frontend.access:
        app.on_response_prepare.append(frontend.access.add_headers)
    routes = all_routes(frontend.config)
    for route in (*routes, *_about(routes, frontend.config.has_keys)):
        handler = _admit(route.generating) if route.generating else route.handler
        assert handler is not None, "a route has a handler"
        if route.generating and frontend.access:
            handler = frontend.access.metered(handler)
        for method in route.methods.split():
            app.router.add_route(method, route.path.replace("{id}", "{id:.+}"), handler)
            if method == "GET":
                app.router.add_route("HEAD", route.path.replace("{id}", "{id:.+}"), handler)
    return app


def _about(routes: tuple[Route, ...], has_keys: bool) -> tuple[Route, ...]:
    """/openapi.json and /docs, made once, and GET /, which leads people to /docs."""
    document = openapi(routes, has_keys)
    schema, page = encode_json(document), docs_page(document)

    async def get_schema(request: web.Request) -> web.Response:
        return web.Response(body=schema, content_type="application/json")

    async def get_page(request: web.Request) -> web.Response:
        text = page.replace(HOST, html.escape(request.host))
        return web.Response(text=text, content_type="text/html")

    async def get_home(request: web.Request) -> web.Response:
        if _is_browser(request):
            return web.Response(status=302, headers={"Location": "/docs"})
        return web.Response(text="Glimmer runs here. Its interface: /docs, /openapi.json\n")

    return (
        Route("/openapi.json", "GET", get_schema),
        Route("/docs", "GET", get_page),
        Route("/", "GET", get_home),
    )


def _is_browser(request: web.Request) -> bool:
    return "text/html" in request.headers.get("Accept", "")


def load(
    config: ServeConfig,
    client: EngineClient,
    tokenizer: Tokenizer | None = None,
    usage: UsageTable | None = None,
    certificate_fd: int | None = None,
) -> Frontend:
    """Read the model directory. `tokenizer`: one that was loaded before. `usage`: of keys, shared
    with other HTTP processes. `certificate_fd`: see `Tls`. Raises ModelError or ConfigError."""
    model_dir = Path(config.model_dir)
    spec = load_model_spec(model_dir)
    tokenizer = tokenizer or Tokenizer(model_dir, spec.vocab_size, config.chat_template)
    facts = ModelFacts(config, spec, load_defaults(model_dir), tokenizer.vocabulary.added_ids)
    max_len = config.max_req_total_len or spec.max_position_embeddings
    metrics = Metrics(config, max_len, client)
    grammars = GrammarChecker(config, spec.vocab_size, tokenizer.vocabulary.added_ids)
    connections = Connections(int(config.max_client_mb * (1 << 20)))
    metrics.follow(connections, grammars)
    return Frontend(
        config,
        facts,
        tokenizer,
        client,
        metrics,
        grammars,
        connections,
        BodyLimits.of(config.max_body_mb, max_len, spec.vocab_size),
        Access(config, connections.budget, usage) if config.has_keys else None,
        Tls(config, certificate_fd) if config.ssl_certfile is not None else None,
        _make_tracer(config, metrics),
    )


def _make_tracer(config: ServeConfig, metrics: Metrics) -> "Tracer | None":
    if config.otlp_traces_endpoint is None:
        return None
    from .engine.traces import Tracer  # needs an extra, which the launcher has looked for

    tracer = Tracer.to(config.otlp_traces_endpoint, config.model_name)
    metrics.follow_traces(lambda: tracer.num_dropped)
    return tracer


async def serve(child: Child) -> None:
    """Run one HTTP process until it has drained. Raises StartError when it cannot start."""
    client = EngineClient(child.runtime_dir, child.index, child.hello())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the launcher handles it
    loop.add_signal_handler(
        signal.SIGTERM, lambda: client.begin_shutdown(child.config.drain_timeout_s)
    )
    link = asyncio.create_task(client.run())
    life = asyncio.create_task(_live(child, client))
    done, _ = await asyncio.wait({link, life}, return_when=asyncio.FIRST_COMPLETED)
    for task in (life, link):
        task.cancel()
    await asyncio.gather(link, life, return_exceptions=True)
    for task in done:
        task.result()  # raises the error that ended it


async def _live(child: Child, client: EngineClient) -> None:
    child.launcher.send(Progress("frontend", child.index, "loading tokenizer"))
    with _bind(child) as listener:
        num_processes, usage = child.config.httpserver_workers, None
        if child.usage_fd is not None and num_processes > 1:
            usage = UsageTable(child.usage_fd, child.index, num_processes)
        frontend = await asyncio.to_thread(
            load, child.config, client, None, usage, child.certificate_fd
        )
        await asyncio.to_thread(frontend.tokenizer.try_template)
        await asyncio.to_thread(check_unchanged, child.config)  # what was read, too
        child.launcher.send(Progress("frontend", child.index, "waiting for the engine"))
        state = client.state
        if not await _first_of(state.became_ready, state.shutdown):
            frontend.tokenizer.close()
            return
        frontend.grammars.start()
        tally = frontend.metrics.tally
        frontend.totals = ServerTotals(child.launcher, child.index, tally, state)
        await frontend.totals.refresh()
        runner = await listen(frontend, listener)
        close_probes = start_probes(frontend, child.metrics_fd)
        child.launcher.send(Ready("frontend", child.index, state.last_epoch))
        beat = _beat(child, frontend)
        helpers = [asyncio.create_task(task) for task in (frontend.connections.run(), beat)]
        reloaders = [part.reloader for part in (frontend.access, frontend.tls) if part]
        if reloaders:
            current = keep_current(reloaders, state.reload, partial(_answer_reload, child))
            helpers.append(asyncio.create_task(current))
        if usage is not None and frontend.access is not None:
            helpers.append(asyncio.create_task(frontend.access.follow_others()))
        if frontend.config.metric_gateway and child.index == 0:  # the metrics are of all processes
            helpers.append(asyncio.create_task(push_forever(frontend)))
        try:
            await state.shutdown.wait()
            await _drain(frontend, runner)
        finally:
            for helper in helpers:
                helper.cancel()
            await runner.cleanup()
            close_probes()
            frontend.grammars.close()
            frontend.tokenizer.close()
            if frontend.tracer is not None:
                frontend.tracer.close()


def _answer_reload(child: Child, problem: str) -> None:
    child.launcher.send(Reloaded(child.index, problem))


async def _beat(child: Child, frontend: Frontend) -> None:
    """Tell the launcher and the probes every second that this event loop runs, and look at what
    should be there, until cancelled."""
    state, launcher_is_silent, num_refused = frontend.client.state, False, 0
    while True:
        frontend.beat_at = now = time.monotonic()
        child.launcher.send(Progress("frontend", child.index, "running"))
        assert frontend.totals is not None, "this process has a launcher"
        frontend.totals.report()
        frontend.client.repair()
        was_silent = launcher_is_silent
        launcher_is_silent = state.launcher_silence_s(now) > LAUNCHER_LIMIT_S
        if launcher_is_silent and not was_silent:
            logger.error("the launcher is silent: it replaces no process that dies")
        elif was_silent and not launcher_is_silent:
            logger.warning("the launcher runs again")
        if frontend.connections.num_refused > num_refused:
            num_refused = frontend.connections.num_refused
            logger.warning(
                "%d connections refused so far: all file descriptors are in use; raise ulimit -n",
                num_refused,
            )
        dropped_lines()  # reports them
        await asyncio.sleep(_BEAT_S)


def _with_tidy_path(make: Callable[..., web.BaseRequest]) -> Callable[..., web.BaseRequest]:
    """Requests whose paths have no doubled slashes and none at the end: some clients join a base
    URL and a route with one too many. All later checks see the tidy path."""

    def make_request(message: RawRequestMessage, *rest: Any) -> web.BaseRequest:
        path, mark, query = message.path.partition("?")
        if path[:1] == "/" and path != "/" and ("//" in path or path[-1] == "/"):
            tidy = (re.sub("/+", "/", path).rstrip("/") or "/") + mark + query
            message = message._replace(path=tidy, url=URL(tidy, encoded=True))
        return make(message, *rest)

    return make_request


class Listening:
    """The open port, and all connections that came through it."""

    def __init__(self, listener: Listener, runner: web.AppRunner, connections: Connections) -> None:
        self._listener, self._runner, self._connections = listener, runner, connections

    async def cleanup(self) -> None:
        """Close the port, let replies end for a moment, close all connections."""
        self._listener.close()
        self._connections.close()
        await self._runner.cleanup()

    def refuse_new(self) -> None:
        """Close the port and idle connections."""
        self._listener.close()
        self._connections.close_idle()


async def listen(frontend: Frontend, listener: socket.socket) -> Listening:
    """Accept connections on a bound socket. A client that goes away cancels its handler."""
    logging.getLogger("aiohttp.server").addFilter(_is_worth_logging)
    runner = web.AppRunner(
        create_app(frontend),
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,  # `read_body` does it within its limits
        keepalive_timeout=75.0,
        max_line_size=MAX_HEAD,
        max_field_size=MAX_HEAD,
        shutdown_timeout=_END_S,
    )
    await runner.setup()
    assert runner.server is not None, "set up"
    runner.server.request_factory = _with_tidy_path(runner.server.request_factory)
    frontend.connections.serve(runner.server, Refusals(frontend))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_used = len(os.listdir("/proc/self/fd")) + _SPARE_FILES
    frontend.connections.max_open = max(1, soft - num_used)
    tls = frontend.tls.context if frontend.tls else None
    return Listening(Listener(listener, frontend.connections, tls), runner, frontend.connections)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Whether to log a record of aiohttp. Bytes that are not HTTP deserve no traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


async def _first_of(wanted: asyncio.Event, otherwise: asyncio.Event) -> bool:
    waits = [asyncio.create_task(event.wait()) for event in (wanted, otherwise)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waits:
            task.cancel()
    return wanted.is_set() and not otherwise.is_set()


async def _drain(frontend: Frontend, listening: Listening) -> None:
    """Wait for the open requests. When the time is up, end the rest with an error."""
    logger.info("draining, %d requests open", frontend.num_open)
    listening.refuse_new()
    state = frontend.client.state
    while frontend.num_open and time.monotonic() < state.shutdown_at:
        await asyncio.sleep(0.02)
    frontend.client.fail_all("the server is shutting down")
    deadline = time.monotonic() + _END_S
    while frontend.num_open and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


def _bind(child: Child) -> socket.socket:
    """The HTTP socket, bound but not listening, so that clients are refused until ready."""
    if child.listen_fd is not None:
        listener = socket.socket(fileno=child.listen_fd)
    else:
        host, port = child.config.host, child.config.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            raise PortError(f"cannot bind {host}:{port}: {error.strerror}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    listener.setblocking(False)
    return listener


def _admit(handler: Generating) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        frontend = request.app[FRONTEND]
        with frontend.counted():
            frontend.check_accepting()
            if not frontend.has_room():
                raise frontend.full()
            body = await read_body(request)
            with frontend.admitted():
                return await handler(frontend, request, body)

    return handle


@web.middleware
async def _middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    request_id = clean_id(request.headers.get("X-Request-Id", "")) or secrets.token_hex(16)
    connection = _connection(request)
    context = request[CONTEXT] = RequestContext(request_id, time.monotonic(), connection)
    request_fields.set({"request_id": request_id})
    try:
        return await handler(request)
    except HttpError as error:
        return await _fail(request, error)
    except web.HTTPRequestEntityTooLarge:
        return await _fail(request, _too_large(request.client_max_size))
    except web.HTTPException as error:
        return _fail_http(request, error)
    except ConnectionError:  # the client went away during a write; the reply is dropped
        return context.stream.response if context.stream else web.Response(status=499)
    except Exception:
        logger.exception("request %s failed", request_id)
        internal = EngineError(f"internal error; request id {request_id}")
        return await _fail(request, internal)
    finally:
        context.drop()
        if request.content.is_eof():
            connection.expect(Expects.HEAD)


def _connection(request: web.Request) -> Connection:
    """Raises ConnectionResetError if the client has gone."""
    connection = request.transport.get_protocol() if request.transport is not None else None
    if not isinstance(connection, Connection):
        raise ConnectionResetError
    return connection


def _fail_http(request: web.Request, error: web.HTTPException) -> web.Response:
    """aiohttp's own refusals in our error body: no such route or method, body too late."""
    kind = "NotFoundError" if error.status == 404 else None
    request.app[FRONTEND].metrics.reject((NotFoundError if kind else RequestError)(error.reason))
    route = f"{request.method} {request.path:.100}"
    response = _refusal(request, error.status, f"{route}: {error.reason}", kind)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


async def _fail(request: web.Request, error: HttpError) -> web.StreamResponse:
    """An error as the last event of the open stream, or as the whole reply."""
    context = request[CONTEXT]
    stream = context.stream
    if stream is None:
        request.app[FRONTEND].metrics.reject(error)
    if stream is not None and stream.is_open:
        with contextlib.suppress(ConnectionError):
            await stream.fail(error)
        return stream.response
    message = message_for(request.path, error)
    kind, field, request_id = error.type, error.field, context.request_id
    fields = error_body(request.path, error.status, message, kind, field, request_id, error.code)
    response = json_response(fields, error.status)
    if error.status == 401 and request.path in ("/", "/docs") and _is_browser(request):
        response = web.Response(status=401, text=KEY_PAGE, content_type="text/html")
    if error.retry_after_s:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.status in (401, 503) or not request.content.is_eof():
        response.force_close()
    return response


def _refusal(
    request: web.Request, status: int, message: str, kind: str | None, field: str | None = None
) -> web.Response:
    request_id = request[CONTEXT].request_id
    return json_response(error_body(request.path, status, message, kind, field, request_id), status)


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"the request body exceeds {limit / (1 << 20):.3g} MB (--max_body_mb)")


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    if CONTEXT in request:  # missing if aiohttp refused before the middleware
        response.headers["X-Request-Id"] = request[CONTEXT].request_id
        if names := request[CONTEXT].ignored:
            response.headers["X-Ignored-Fields"] = clean_names(names)
        if "anthropic-version" in request.headers:
            response.headers["request-id"] = request[CONTEXT].request_id
    response.headers["Server"] = "glimmer"
    if request.app[FRONTEND].client.state.is_leaving:
        response.force_close()
        response.headers["Connection"] = "close"  # aiohttp has chosen this header already
