"""Probes and /metrics on a port of their own (`--metrics_port`).

A thread with its own event loop answers them from memory, so that neither requests nor long
computations of the main event loop delay them. It also tells when that loop hangs.
"""

import asyncio
import socket
import threading
from collections.abc import Callable

import uvloop
from aiohttp import web

from .api import ops
from .context import FRONTEND, Frontend

_PROBES = {
    "/health": ops.health,
    "/healthz": ops.health,
    "/ping": ops.health,
    "/liveness": ops.liveness,
    "/readiness": ops.readiness,
    "/metrics": ops.metrics,
}
_KEEPALIVE_S = 75.0


def start_probes(frontend: Frontend, listen_fd: int | None) -> Callable[[], None]:
    """Answer on the bound socket `listen_fd` (None: nowhere). Returns a function that ends it."""
    if listen_fd is None:
        return lambda: None
    loop = uvloop.new_event_loop()
    ended = loop.create_future()
    listener = socket.socket(fileno=listen_fd)
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(_serve(frontend, listener, ended)), daemon=True
    )
    thread.start()

    def close() -> None:
        loop.call_soon_threadsafe(ended.set_result, None)
        thread.join()
        loop.close()

    return close


async def _serve(
    frontend: Frontend, listener: socket.socket, ended: "asyncio.Future[None]"
) -> None:
    app = web.Application(client_max_size=1)
    app[FRONTEND] = frontend
    for path, handler in _PROBES.items():
        app.router.add_get(path, handler)
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=_KEEPALIVE_S)
    await runner.setup()
    listener.setblocking(False)
    await web.SockSite(runner, listener).start()
    try:
        await ended
    finally:
        await runner.cleanup()
