"""Routes for operating the server: probes, metrics, model names.

All are answered from memory, so a probe never waits for generation.
"""

import datetime
import time
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from ...shared.errors import NotFoundError
from ..context import FRONTEND
from ..engine.client import LAUNCHER_LIMIT_S
from ..engine.engine_metrics import kv_usage
from ..wire.body import json_response

_LOOP_LIMIT_S = 10.0  # the loop notes each second that it runs; a probe may come before the note


async def health(request: web.Request) -> web.Response:
    """GET /health: 503 when heartbeats are missing, or there is work without progress."""
    frontend = request.app[FRONTEND]
    state, now = frontend.client.state, time.monotonic()
    is_healthy = state.is_healthy(now, frontend.config.health_timeout_s)
    if is_healthy and state.launcher_silence_s(now) <= LAUNCHER_LIMIT_S:
        return json_response({"message": "Ok"})
    return json_response({"message": "Error"}, 503)


async def liveness(request: web.Request) -> web.Response:
    """GET /liveness: 200 while this process's event loop runs."""
    age = time.monotonic() - request.app[FRONTEND].beat_at
    if age <= _LOOP_LIMIT_S:
        return json_response({"status": "ok"})
    return json_response({"status": f"the event loop has not run for {age:.0f} s"}, 503)


async def readiness(request: web.Request) -> web.Response:
    """GET /readiness: 503 with the reason while new requests are refused or the engine makes no
    progress."""
    frontend = request.app[FRONTEND]
    reason = frontend.client.state.why_unready(time.monotonic())
    return json_response({"status": reason}, 503) if reason else json_response({"status": "ok"})


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics: metrics in Prometheus's text format, for all HTTP processes together."""
    frontend = request.app[FRONTEND]
    if frontend.totals is not None:
        await frontend.totals.refresh()
    body = frontend.metrics.render()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def token_load(request: web.Request) -> web.Response:
    """GET /token_load: fraction of the KV pages in use, now and at the estimated peak."""
    frontend = request.app[FRONTEND]
    heartbeat = frontend.client.state.heartbeat
    current = peak = 0.0
    if heartbeat is not None:
        current = kv_usage(heartbeat)
        capacity = heartbeat.pages_total * frontend.config.page_size
        peak = heartbeat.estimated_peak_tokens / max(1, capacity)
    return json_response(
        {"current_load": current, "logical_max_load": 0.0, "dynamic_max_load": peak}
    )


async def model_name(request: web.Request) -> web.Response:
    """GET or POST /get_model_name: the name of the model."""
    return json_response({"model_name": request.app[FRONTEND].config.model_name})


async def models(request: web.Request) -> web.Response:
    """GET /v1/models: the one model that is served."""
    card = _model_card(request)
    more = {}
    if "anthropic-version" in request.headers:
        more = {"first_id": card["id"], "last_id": card["id"], "has_more": False}
    return json_response({"object": "list", "data": [card], **more})


async def model(request: web.Request) -> web.Response:
    """GET /v1/models/{id}: the served model, or 404 for any other id."""
    card = _model_card(request)
    model_id = request.match_info["id"]
    if model_id != card["id"]:
        raise NotFoundError(f"model {model_id!r:.200} is not served here", "model")
    return json_response(card)


def _model_card(request: web.Request) -> dict[str, Any]:
    """The served model. Anthropic's clients also get the keys of their interface."""
    frontend = request.app[FRONTEND]
    name = frontend.config.model_name
    card = {
        "id": name,
        "object": "model",
        "created": frontend.created,
        "owned_by": frontend.config.model_owner or "lightllm",
        "max_model_len": frontend.client.max_req_total_len,
    }
    if "anthropic-version" in request.headers:
        made = datetime.datetime.fromtimestamp(frontend.created, datetime.UTC).isoformat()
        card |= {"type": "model", "display_name": name, "created_at": made}
    return card
