"""`--access_log`: one line for each HTTP request when it has ended. No bodies, no query strings."""

import logging
import time

from aiohttp import web
from aiohttp.typedefs import Handler

logger = logging.getLogger("glimmer.access")
logger.setLevel(logging.INFO)  # also if the log level hides lines of this importance
_DISCONNECTED = 499


@web.middleware
async def log_access(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Must be outside the middleware that gives a request its id."""
    started = time.monotonic()
    status, size = _DISCONNECTED, 0
    try:
        response = await handler(request)
        status, size = response.status, _size(response)
        return response
    finally:
        line(request.remote or "-", request.method, request.raw_path, status, size, started)


def line(peer: str, method: str, path: str, status: int, size: int, started: float) -> None:
    """Log one request. `size`: bytes of its body. `started`: by `time.monotonic`."""
    path = path.partition("?")[0][:500]
    total_ms = round((time.monotonic() - started) * 1e3, 1)
    fields: dict[str, object] = {"message": "access", "peer": peer, "method": method, "path": path}
    fields |= {"status": status, "bytes": size, "total_ms": total_ms}
    text = '%s "%s %s" %d %d bytes %.1f ms'
    logger.info(text, peer, method, path, status, size, total_ms, extra={"fields": fields})


def _size(response: web.StreamResponse) -> int:
    if isinstance(response, web.Response):
        return response.content_length or 0
    return response.body_length
