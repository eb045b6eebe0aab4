"""Refuses whole posts by their bytes, without the cost of a request in aiohttp.

Called with the first post of a connection. So a flood of posts to a full server, without a key, or
with a key whose limit is reached costs little. All other posts are refused by their handlers.
"""

import random
import re
import time

from ..shared.errors import HttpError
from ..shared.log_format import request_fields
from .access_log import line as access_line
from .context import Frontend, clean_id
from .engine.metrics import FAILURES, REQUESTS
from .routes import all_routes
from .wire.connection import HEAD_END
from .wire.errors import refusal_bytes

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,9})[ \t]*\r\n", re.IGNORECASE)
_REQUEST_ID = re.compile(rb"\r\nx-request-id:[ \t]*([^\r\n]*)", re.IGNORECASE)


class Refusals:
    """`Connections.serve` calls this for each first post."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        routes = all_routes(frontend.config)
        self._paths = {route.path.encode() for route in routes if route.generating}

    def __call__(self, data: bytes, num_waiting: int, closes: bool) -> bytes:
        """The reply to a generating request that is refused; b"" if it must be handled. See
        `Connections.serve` for the arguments."""
        frontend = self._frontend
        is_full = not frontend.has_room(num_waiting)
        if not is_full and frontend.access is None:
            return b""
        end = data.find(HEAD_END) + len(HEAD_END)
        path, length = data.split(b" ", 2)[1], _LENGTH.search(data, 0, end)
        is_whole = length is not None and len(data) == end + int(length[1])
        state = frontend.client.state
        if path not in self._paths or not is_whole or state.is_leaving or state.why_not_ready():
            return b""
        error, headers = self._why(data[:end], is_full)
        if error is None:
            return b""
        frontend.metrics.tally.count(REQUESTS)
        frontend.metrics.tally.count(FAILURES)
        frontend.metrics.reject(error)
        given = _REQUEST_ID.search(data, 0, end)
        request_id = clean_id(given[1].decode("latin-1")) if given else ""
        request_id = request_id or f"{random.getrandbits(128):032x}"
        if frontend.config.access_log:
            token = request_fields.set({"request_id": request_id})
            access_line("-", "POST", path.decode(), error.status, 0, time.monotonic())
            request_fields.reset(token)
        return refusal_bytes(path.decode(), error, request_id, headers, closes)

    def _why(self, head: bytes, is_full: bool) -> tuple[HttpError | None, dict[str, str]]:
        error: HttpError | None = None
        headers: dict[str, str] = {}
        if self._frontend.access is not None:
            error, headers = self._frontend.access.refusal_of_head(head)
        if error is None and is_full:
            error = self._frontend.full()
        return error, headers
