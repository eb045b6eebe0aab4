"""HTTP bodies: a request's bytes, decoded to a struct of `schema.py`, and JSON for the answer."""

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from ...shared.errors import OverloadedError, RequestError
from ..context import FRONTEND

Body = TypeVar("Body")
BODY_TIMEOUT_S = 60.0
_MAX_BODIES = 16  # bodies of the maximum size that may be incomplete in memory at a time
encode_json = msgspec.json.Encoder().encode


def json_response(value: Any, status: int = 200) -> web.Response:
    """A JSON response."""
    return web.Response(body=encode_json(value), status=status, content_type="application/json")


async def read_body(request: web.Request) -> bytes:
    """The whole body.

    Refuses a compressed body (400), one that is too large (413; before reading it if its length
    is known), one that takes too long to arrive (408), and any body while clients that send
    slowly already hold too much memory (429).
    """
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise RequestError(f"Content-Encoding: {encoding:.40} is not supported", "Content-Encoding")
    size, limit = request.content_length or 0, request.client_max_size
    if size > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=size)
    frontend = request.app[FRONTEND]
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.content.iter_any():
                body += chunk
                frontend.num_body_bytes += len(chunk)
                if len(body) > limit:
                    raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=len(body))
                if frontend.num_body_bytes > _MAX_BODIES * limit:
                    raise OverloadedError("too many request bodies are on their way", None, 1.0)
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason="the body did not arrive in time") from None
    finally:
        frontend.num_body_bytes -= len(body)
    return bytes(body)


def decode_body(data: bytes, kind: type[Body]) -> Body:
    """JSON -> struct. Raises RequestError naming the field that is wrong."""
    try:
        return msgspec.json.decode(data, type=kind)
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
