"""Text to token ids and back: LightLLM's /tokens, vLLM's /tokenize, /detokenize and
/tokenizer_info."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from aiohttp import web
from msgspec import Meta, Struct

from ..chat.request import check_tools, normalise_messages, template_kwargs
from ..context import FRONTEND, Frontend
from ..wire.body import encode_json, json_response, read_body
from ..wire.schema import (
    ChatBody,
    Effort,
    GenerateParameters,
    Messages,
    Thinking,
    TokensBody,
    Tools,
    wrong,
)


class TokenizeBody(Struct):
    """Body of /tokenize: a prompt, or the messages of a chat."""

    prompt: str | None = None
    messages: Messages | None = None
    model: Annotated[str, Meta(max_length=256)] = "default"
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    thinking: Thinking | None = None


class DetokenizeBody(Struct):
    """Body of /detokenize."""

    tokens: list[int]
    model: Annotated[str, Meta(max_length=256)] = "default"


async def tokens(request: web.Request) -> web.Response:
    """GET or POST /tokens: how many tokens a text has."""
    frontend = request.app[FRONTEND]
    body, _ = await (await read_body(request)).decode(TokensBody, lambda _: None)
    special = (body.parameters or GenerateParameters()).add_special_tokens is not False
    ids = await frontend.tokenizer.encode(
        body.text, "text", frontend.client.max_req_total_len, special
    )
    return json_response({"ntokens": len(ids)})


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize: the ids of a text, or of the prompt that a chat becomes."""
    frontend = request.app[FRONTEND]
    build = partial(_encoder, frontend)
    body, encode = await (await read_body(request)).decode(TokenizeBody, build)
    ids = await encode()

    def reply() -> bytes:
        text = frontend.tokenizer.vocabulary.text
        return encode_json(
            {
                "count": len(ids),
                "max_model_len": frontend.client.max_req_total_len,
                "tokens": ids,
                "token_strs": [text(i) for i in ids] if body.return_token_strs else None,
            }
        )

    data = await frontend.tokenizer.run(reply)
    return web.Response(body=data, content_type="application/json")


def _encoder(frontend: Frontend, body: TokenizeBody) -> Callable[[], Awaitable[list[int]]]:
    """Check the body. The result makes the ids."""
    tokenizer, max_total = frontend.tokenizer, frontend.client.max_req_total_len
    if (body.prompt is None) == (body.messages is None):
        raise wrong("prompt", "give either prompt or messages")
    if body.messages is None:
        assert body.prompt is not None, "either prompt or messages is set"
        special = body.add_special_tokens is not False
        return partial(tokenizer.encode, body.prompt, "prompt", max_total, special)
    if body.add_generation_prompt is False:
        raise wrong("add_generation_prompt", "chats are always completed by the assistant")
    if body.continue_final_message:
        raise wrong("continue_final_message", "not supported")
    chat = ChatBody(
        messages=body.messages,
        chat_template_kwargs=body.chat_template_kwargs,
        reasoning_effort=body.reasoning_effort,
        thinking=body.thinking,
    )
    kwargs = template_kwargs(chat, frontend.facts)
    messages, tools = normalise_messages(body.messages), check_tools(body.tools)
    return partial(tokenizer.encode_chat, messages, tools, kwargs, max_total)


async def tokenizer_info(request: web.Request) -> web.Response:
    """GET /tokenizer_info: tokenizer_config.json and the chat template, as in vLLM."""
    return json_response(request.app[FRONTEND].tokenizer.info)


async def detokenize(request: web.Request) -> web.Response:
    """POST /detokenize: the text of token ids, special tokens included."""
    frontend = request.app[FRONTEND]
    limit = frontend.client.max_req_total_len

    def decode(body: DetokenizeBody) -> str:
        if len(body.tokens) > limit:
            problem = f"{len(body.tokens)} ids; at most {limit}, as many as a request has"
            raise wrong("tokens", problem)
        frontend.tokenizer.check_ids(body.tokens, "tokens")
        return frontend.tokenizer.decode(body.tokens)

    _, text = await (await read_body(request)).decode(DetokenizeBody, decode)
    return json_response({"prompt": text})
