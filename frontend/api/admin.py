"""Routes about the server itself: its settings, its cache, requests to end.

Routes by which one user could disturb all others need an admin key: flushing the cache, and
aborting requests of others. On a server without keys they need `--enable_admin_api`.
"""

from typing import Annotated

from aiohttp import web
from msgspec import Meta, Struct

from ... import __version__
from ...shared.config import flag_fields
from ...shared.errors import RequestError
from ..access.guard import check_admin
from ..context import CONTEXT, FRONTEND, Frontend, clean_id
from ..wire.body import json_response, read_body
from ..wire.schema import wrong


class AbortBody(Struct):
    """Body of /abort_request. `request_id`, or `rid`, is the X-Request-Id of a request."""

    request_id: Annotated[str, Meta(max_length=128)] | int | None = None
    rid: Annotated[str, Meta(max_length=128)] | int | None = None
    abort_all: bool | None = None


async def server_info(request: web.Request) -> web.Response:
    """GET or POST /get_server_info: version, start arguments, settled limits; paths on this
    machine only for an admin key."""
    frontend, key = request.app[FRONTEND], request[CONTEXT].key
    is_admin = key is not None and key.is_admin
    info = {
        field.name: getattr(frontend.config, field.name)
        for field in flag_fields().values()
        if not field.metadata.get("secret") and (is_admin or not field.metadata.get("private"))
    }
    state = frontend.client.state
    engine = None
    if state.ready is not None:
        names = ("epoch", "num_pages", "max_req_total_len")
        engine = {name: getattr(state.ready, name) for name in names}
    status = state.why_not_ready() or "ready"
    vocab_size = frontend.tokenizer.vocab_size
    more = {"version": __version__, "state": status, "engine": engine, "vocab_size": vocab_size}
    return json_response({**info, **more})


async def version(request: web.Request) -> web.Response:
    """GET /version: the version of the server."""
    return json_response({"version": __version__})


async def weight_version(request: web.Request) -> web.Response:
    """GET or POST /get_weight_version: weights never change while the server runs."""
    return json_response({"weight_version": "default"})


async def flush_cache(request: web.Request) -> web.Response:
    """GET or POST /flush_cache: drop all cached prefixes that no running request uses."""
    frontend = request.app[FRONTEND]
    _check_allowed(frontend, request, "/flush_cache")
    frontend.client.flush_cache()
    return json_response({"message": "Ok"})


async def abort_request(request: web.Request) -> web.Response:
    """POST /abort_request: end a request of any HTTP process; its reply says "abort".

    With API keys only requests of the same key are ended, unless it is an admin key.
    """
    frontend, key = request.app[FRONTEND], request[CONTEXT].key
    tenant = None if key is None or key.is_admin else key.name
    body, _ = await (await read_body(request)).decode(AbortBody, lambda _: None)
    request_id = body.request_id if body.request_id is not None else body.rid
    name = "" if request_id is None else clean_id(str(request_id))
    if body.abort_all:
        if tenant is None:
            _check_allowed(frontend, request, "abort_all")
        name = ""
    elif not name:
        raise wrong("request_id", "must be the X-Request-Id of a request")
    frontend.client.abort_named(name, tenant)
    frontend.client.tell_others(frontend.config.httpserver_workers, name, tenant)
    return json_response({"message": "Ok"})


async def no_profiler(request: web.Request) -> web.Response:
    """GET /profiler_start and /profiler_stop: 400, there is no profiler."""
    raise RequestError("the server has no profiler")


async def no_score(request: web.Request) -> web.Response:
    """POST /get_score: 400, this is no reward model."""
    raise RequestError("the model generates text, it gives no scores")


def _check_allowed(frontend: Frontend, request: web.Request, action: str) -> None:
    if frontend.access is not None:
        check_admin(request)
    elif not frontend.config.enable_admin_api:
        raise RequestError(f"{action} needs --enable_admin_api")
