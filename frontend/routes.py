"""The table of routes: path, methods, handler, and facts for `/openapi.json`.

A generating route runs a request on the engine: its handler gets the body, the request
counts as open, and it is refused while the server cannot take more. This process answers all other
routes by itself.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from ..shared.config import ServeConfig
from .api import admin, anthropic, generate, ops, responses, tgi, token_routes
from .api.admin import AbortBody
from .api.anthropic_request import CountTokensBody, MessagesBody
from .api.completions import completions
from .api.openai import chat
from .api.responses_request import ResponsesBody
from .context import Frontend
from .wire.body import Payload
from .wire.schema import ChatBody, CompletionBody, GenerateBody, TokensBody

Generating = Callable[[Frontend, web.Request, Payload], Awaitable[web.StreamResponse]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Route:
    """One path. Exactly one of `handler` and `generating` is set."""

    path: str
    methods: str = "POST"
    handler: Handler | None = None
    generating: Generating | None = None
    body: type | None = None  # of POST
    streams: bool = False  # may answer with an event stream
    media: str = "application/json"  # of the plain answer
    also: tuple[int, ...] = ()  # statuses besides those that every route may return

    @property
    def has_envelope(self) -> bool:
        """Whether all of its refusals are error objects. Probes have their own format."""
        return self.handler not in (ops.health, ops.readiness)

    @property
    def summary(self) -> str:
        """The first paragraph of its handler's docstring, without the path."""
        text = ((self.handler or self.generating).__doc__ or "").split("\n\n")[0]
        return " ".join(text.partition(": ")[2].split()).rstrip(".")


def _get(path: str, handler: Handler, **more: Any) -> Route:
    return Route(path, "GET", handler, **more)


def _both(path: str, handler: Handler, **more: Any) -> Route:
    return Route(path, "GET POST", handler, **more)


def all_routes(config: ServeConfig) -> tuple[Route, ...]:
    """The routes of a server with these settings."""
    lightllm, body = (tgi, tgi.TgiBody) if config.use_tgi_api else (generate, GenerateBody)
    return (
        Route("/", generating=lightllm.generate_either, body=body, streams=True),
        Route("/generate", generating=lightllm.generate, body=body),
        Route("/generate_stream", generating=lightllm.generate_stream, body=body, streams=True),
        Route("/v1/chat/completions", generating=chat, body=ChatBody, streams=True),
        Route("/v1/completions", generating=completions, body=CompletionBody, streams=True),
        Route("/v1/messages", generating=anthropic.messages, body=MessagesBody, streams=True),
        Route("/v1/messages/count_tokens", generating=anthropic.count_tokens, body=CountTokensBody),
        Route("/v1/responses", generating=responses.responses, body=ResponsesBody, streams=True),
        _get("/v1/models", ops.models),
        _get("/v1/models/{id}", ops.model, also=(404,)),
        _both("/tokens", token_routes.tokens, body=TokensBody),
        Route("/tokenize", handler=token_routes.tokenize, body=token_routes.TokenizeBody),
        Route("/detokenize", handler=token_routes.detokenize, body=token_routes.DetokenizeBody),
        _get("/tokenizer_info", token_routes.tokenizer_info),
        _get("/health", ops.health),
        _get("/healthz", ops.health),
        _both("/ping", ops.health),
        _both("/liveness", ops.liveness),
        _both("/readiness", ops.readiness),
        _get("/metrics", ops.metrics, media="text/plain"),
        _get("/token_load", ops.token_load),
        _both("/get_model_name", ops.model_name),
        _get("/version", admin.version),
        _both("/get_server_info", admin.server_info),
        _both("/get_weight_version", admin.weight_version),
        _both("/flush_cache", admin.flush_cache),
        Route("/abort_request", handler=admin.abort_request, body=AbortBody),
        _get("/profiler_start", admin.no_profiler),
        _get("/profiler_stop", admin.no_profiler),
        Route("/get_score", handler=admin.no_score),
    )
