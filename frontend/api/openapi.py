"""`/openapi.json`, made from the routes and the structs of their bodies, and the page `/docs`."""

import msgspec
from msgspec import Struct

from ... import __version__
from ..access.guard import PUBLIC_PATHS
from ..routes import Route
from ..wire.schema import Json
from .field_docs import field_doc

_REFUSALS = {
    400: "The request is wrong: `param` names the field.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is compressed in a way that is not supported.",
    429: "Too many requests: see Retry-After.",
    500: "An error of the server.",
    503: "The engine cannot take requests now: see Retry-After.",
}
_ALSO = {404: "Not found."}
_LOCKED = {"401": "The API key is missing or wrong.", "403": "Only an admin key may do this."}
_HELLO = [{"role": "user", "content": "Hello"}]
_EXAMPLES: Json = {
    "AbortBody": {"request_id": "a3f1"},
    "ChatBody": {"messages": _HELLO, "max_tokens": 100},
    "CompletionBody": {"prompt": "What is AI?", "max_tokens": 16},
    "CountTokensBody": {"messages": _HELLO},
    "DetokenizeBody": {"tokens": [1, 2, 3]},
    "GenerateBody": {"inputs": "What is AI?", "parameters": {"max_new_tokens": 16}},
    "MessagesBody": {"messages": _HELLO, "max_tokens": 100},
    "ResponsesBody": {"input": "Hello", "max_output_tokens": 100},
    "TgiBody": {"inputs": "What is AI?", "parameters": {"max_new_tokens": 16, "stop": ["."]}},
    "TokenizeBody": {"prompt": "What is AI?"},
    "TokensBody": {"text": "What is AI?"},
}
_ERROR = {"$ref": "#/components/schemas/Refusal"}
_ANTHROPIC_ERROR = {"$ref": "#/components/schemas/AnthropicRefusal"}


class ErrorObject(Struct):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: int


class Refusal(Struct):
    """Body of an error reply."""

    error: ErrorObject
    message: str


class AnthropicErrorObject(Struct):
    """Anthropic's error object."""

    type: str
    message: str


class AnthropicRefusal(Struct):
    """Body of an error reply on Anthropic's paths."""

    type: str
    error: AnthropicErrorObject
    request_id: str | None


def openapi(routes: tuple[Route, ...], has_keys: bool = False) -> Json:
    """The OpenAPI 3.1 document of a server with or without API keys."""
    bodies = {route.body for route in routes if route.body is not None}
    types = [*sorted(bodies, key=lambda body: body.__name__), Refusal, AnthropicRefusal]
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for name, schema in schemas.items():
        schema["properties"] = {
            field: _described(name, field, about)
            for field, about in schema.get("properties", {}).items()
        }
    document: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "Glimmer",
            "version": __version__,
            "description": "A server for GLM-4.7-Flash. Unknown fields of bodies are ignored.",
        },
        "paths": {route.path: _path(route) for route in routes},
        "components": {"schemas": schemas},
    }
    return _locked(document) if has_keys else document


def _locked(document: Json) -> Json:
    """Say that all routes but the probes need a key, in one of two headers."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    document["security"] = [{"bearer": []}, {"x-api-key": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path in PUBLIC_PATHS:
                operation["security"] = []
                continue
            refusal = operation["responses"]["400"]["content"]
            for status, text in _LOCKED.items():
                operation["responses"][status] = {"description": text, "content": refusal}
    return document


def _described(struct: str, field: str, schema: Json) -> Json:
    """The schema of a field with its meaning and, as `x-default`, the default in words."""
    meaning, default = field_doc(struct, field)
    return {**schema, "description": meaning} | ({"x-default": default} if default else {})


def _path(route: Route) -> Json:
    return {method.lower(): _operation(route, method) for method in route.methods.split()}


def _operation(route: Route, method: str) -> Json:
    name = route.path.strip("/").replace("/", "_").replace("{", "").replace("}", "")
    operation: Json = {
        "operationId": f"{method.lower()}_{name or 'root'}",
        "summary": route.summary,
        "responses": _responses(route),
    }
    if "{id}" in route.path:
        schema = {"type": "string"}
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": schema}]
    if route.body is not None and method == "POST":
        schema = {"$ref": f"#/components/schemas/{route.body.__name__}"}
        example = _EXAMPLES[route.body.__name__]
        content = {"application/json": {"schema": schema, "example": example}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _responses(route: Route) -> Json:
    content: Json = {route.media: {"schema": {}}}
    if route.streams:
        content["text/event-stream"] = {"schema": {}}
    error = _ANTHROPIC_ERROR if route.path.startswith("/v1/messages") else _ERROR
    refusal = {"application/json": {"schema": error if route.has_envelope else {}}}
    refusals = _REFUSALS | {status: _ALSO[status] for status in route.also}
    return {"200": {"description": "Done.", "content": content}} | {
        str(status): {"description": text, "content": refusal}
        for status, text in sorted(refusals.items())
    }
