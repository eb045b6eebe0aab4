"""The JSON body of an error reply, in the format of each interface.

Anthropic's error object on Anthropic's paths; on all others OpenAI's, with LightLLM's top-level
`message` beside it.
"""

import math
from collections.abc import Mapping

import msgspec
from aiohttp.helpers import rfc822_formatted_time

from ...shared.errors import ContextLengthError, HttpError
from .schema import Json

_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(
    path: str,
    status: int,
    message: str,
    kind: str | None = None,
    field: str | None = None,
    request_id: str | None = None,
    code: str | None = None,
) -> Json:
    """The body of an error reply of `path`. `kind` is OpenAI's `type`, `field` its `param`, `code`
    the status if it has no name."""
    message = message.encode(
        "utf-8", "replace"
    ).decode()  # paths and headers may hold invalid UTF-8
    if _is_anthropic(path):
        return {**anthropic_error(status, message), "request_id": request_id}
    error = {"message": message, "type": kind or "BadRequestError", "param": field}
    return {"error": {**error, "code": code or status}, "message": message}


def message_for(path: str, error: HttpError) -> str:
    """The error's message in the words of the interface."""
    if isinstance(error, ContextLengthError) and _is_anthropic(path):
        numbers = f"{error.num_tokens} tokens > {error.limit - 1} maximum"
        return f"prompt is too long: {numbers}{error.estimate}"
    return str(error)


def _is_anthropic(path: str) -> bool:
    return path == _ANTHROPIC_PATH or path.startswith(_ANTHROPIC_PATH + "/")


def anthropic_error(status: int, message: str) -> Json:
    """Anthropic's error object, also the data of its `error` event."""
    other = "api_error" if status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_TYPES.get(status, other)
    return {"type": "error", "error": {"type": kind, "message": message}}


def refusal_bytes(
    path: str, error: HttpError, request_id: str, headers: Mapping[str, str], closes: bool
) -> bytes:
    """The whole HTTP reply to a request of `path` that is refused before it is parsed. `closes`:
    the connection will be closed after it."""
    fields = error_body(path, error.status, str(error), error.type, error.field, request_id)
    body = msgspec.json.encode(fields)
    hint = f"Retry-After: {max(1, math.ceil(error.retry_after_s))}"
    if error.status == 401:
        hint = "WWW-Authenticate: Bearer"
    more = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    more += "Connection: close\r\n" if closes else ""
    head = (
        f"HTTP/1.1 {error.status} Refused\r\nX-Request-Id: {request_id}\r\n{hint}\r\n{more}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Date: {rfc822_formatted_time()}\r\nServer: glimmer\r\n\r\n"
    )
    return head.encode() + body
