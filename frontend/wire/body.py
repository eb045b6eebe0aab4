"""HTTP bodies: a request's bytes, decoded to a struct of `schema.py`, and JSON for the answer."""

import asyncio
import codecs
import re
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web

from ...shared.errors import RequestError
from ..context import CONTEXT, FRONTEND, RequestContext
from ..text.fair_queue import LARGE_FOR
from ..text.tokenizer import Tokenizer
from .coding import pieces
from .connection import Expects
from .shape import Shape
from .surrogates import decode_json

if TYPE_CHECKING:  # `engine/job.py` imports this folder
    from ..engine.job import Job

Body = TypeVar("Body")
BODY_TIMEOUT_S = 60.0
SMALL_BYTES = 64 << 10  # bodies up to this size are decoded at once
_MANY = 1024  # a longer list has short elements
_fields_of = attrgetter("__struct_fields__")
_MEMBERS = dict[str, msgspec.Raw]
T = TypeVar("T")
encode_json = msgspec.json.Encoder().encode


def json_response(value: Any, status: int = 200) -> web.Response:
    """A JSON response."""
    return web.Response(body=encode_json(value), status=status, content_type="application/json")


async def json_reply(job: "Job[Any]", make: Callable[[], Any]) -> web.Response:
    """The reply that `make` builds. If it is large, other requests are served meanwhile."""
    if not job.is_large:
        return json_response(make())
    body = await job.frontend.tokenizer.run_large(lambda: _encode_in_parts(make()))
    return web.Response(body=body, content_type="application/json")


def _encode_in_parts(value: Any) -> bytes:
    """JSON, encoded by many short calls: each of them keeps other threads from running."""
    if isinstance(value, dict):
        members = [encode_json(k) + b":" + _encode_in_parts(v) for k, v in value.items()]
        return b"{" + b",".join(members) + b"}"
    if isinstance(value, list):
        encode = encode_json if len(value) > _MANY else _encode_in_parts
        return b"[" + b",".join(map(encode, value)) + b"]"
    return encode_json(value)


async def read_body(request: web.Request) -> "Payload":
    """The whole body.

    Refuses a coding other than gzip and deflate (415), a body that is too large, decoded (413;
    before reading it if its length is known), one that takes too long to arrive (408), and any body
    while too much is held for this client or for all (429).
    """
    arriving = pieces(request)
    size, limit = request.content_length or 0, request.client_max_size
    if size > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=size)
    context, frontend = request[CONTEXT], request.app[FRONTEND]
    context.connection.expect(Expects.BODY)
    body = bytearray()
    shape: Shape | None = None
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in arriving:
                context.hold(len(chunk))
                body += chunk
                if len(body) > limit:
                    raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=len(body))
                if shape is not None:
                    shape.add(chunk)
                elif len(body) > SMALL_BYTES:
                    shape = Shape(frontend.body_limits)
                    shape.add(bytes(body))
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason="the body did not arrive in time") from None
    context.connection.expect(Expects.NOTHING)
    if shape is not None:
        context.hold(shape.num_bytes)
        LARGE_FOR.set(context.tenant or request.remote or "")
    return Payload(bytes(body), frontend.tokenizer, context, frontend.config.strict_fields)


class Payload:
    """The bytes of a body, until they are decoded."""

    def __init__(
        self, data: bytes, tokenizer: Tokenizer, context: RequestContext, is_strict: bool
    ) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._context, self._is_strict = context, is_strict

    async def decode(
        self, kind: type[Body], build: Callable[[Body], T], *forget: str
    ) -> tuple[Body, T]:
        """The typed body, and what `build` makes of it. The bytes and the fields `forget` are
        dropped. If the bytes are many, other requests are served meanwhile. Raises RequestError
        naming the field that is wrong, and what `build` raises."""
        data, self._data = self._data, b""
        job = partial(_build, data, kind, build, forget)
        if len(data) <= SMALL_BYTES:
            body, result, unknown = job()
        else:
            del data
            body, result, unknown = await self._tokenizer.run_large(job)
        self._context.ignore(unknown, self._is_strict)
        return body, result


def _build(
    data: bytes, kind: type[Body], build: Callable[[Body], T], forget: tuple[str, ...]
) -> tuple[Body, T, list[str]]:
    """The third: names of fields that `kind` does not have."""
    body = decode_body(data, kind)
    result = build(body)
    for name in forget:
        setattr(body, name, None)
    known = _fields_of(kind)
    return body, result, [name for name in decode_body(data, _MEMBERS) if name not in known]


def decode_body(data: bytes, kind: type[Body]) -> Body:
    """JSON -> struct. Raises RequestError naming the field that is wrong."""
    try:
        body: Body = decode_json(data.removeprefix(codecs.BOM_UTF8), kind)
        return body
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _body_error(error) from None


def _body_error(error: Exception) -> RequestError:
    if not isinstance(error, msgspec.ValidationError):
        return RequestError(f"body is not valid JSON: {error}")
    problem, _, location = str(error).partition(" - at ")
    missing = re.search(r"missing required field `(\w+)`", problem)
    path = re.search(r"`\$\.?([^`]*)`", location)
    field = ".".join(p for p in (path and path[1], missing and missing[1]) if p)
    return RequestError(f"{field or 'body'}: {problem}", field=field or None)
