"""Anthropic's request bodies: their schema, and their translation to OpenAI's chat terms.

Blocks become messages that the chat template knows: a tool result is a message, thinking is the
reasoning of its turn, a tool use is a call. Cache marks, metadata and the signatures of thinking
blocks are accepted and have no effect. Thinking is off unless a request turns it on, as in
Anthropic's interface.
"""

import dataclasses
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from ..chat.client_tools import built_in, function, kinds_of
from ..chat.history import call_arguments, name_of, text_in
from ..chat.request import ChatRequest, chat_request, string_at
from ..engine.params import ModelFacts
from ..wire.schema import Bias, ChatBody, Count, Json, StopString, Temperature, TopP, wrong

Blocks = str | Annotated[list[Json], Meta(max_length=10_000)]
# One client sends it with another value in each request, so no prompt would match the cache.
_VOLATILE_BLOCK = "x-anthropic-billing-header"


class Turn(Struct):
    """One message: text, or blocks of text, thinking, tool_use and tool_result."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class ThinkingConfig(Struct):
    """`thinking`. Every type but "disabled" turns it on."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Count | None = None
    display: str | None = None  # "omitted" hides it; every other value shows it whole


class ToolChoice(Struct):
    """`tool_choice`; `name` with type "tool" only."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Tool(Struct):
    """A tool. One that a server would run has a type of its own, and is left out."""

    name: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    input_schema: Json | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None


class OutputConfig(Struct):
    """`output_config`: a JSON schema for the text of the reply; effort has no effect."""

    format: Json | None = None
    effort: str | None = None


class CountTokensBody(Struct):
    """Body of /v1/messages/count_tokens: the fields that make the prompt."""

    messages: Annotated[list[Turn], Meta(max_length=10_000)]
    model: Annotated[str, Meta(max_length=256)] = "default"
    system: Blocks | None = None
    tools: Annotated[list[Tool], Meta(max_length=1024)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: Json | None = None  # the older name of output_config.format
    chat_template_kwargs: Json | None = None  # this and the next: ours
    enable_thinking: bool | None = None


class MessagesBody(CountTokensBody, kw_only=True):
    """Body of /v1/messages."""

    max_tokens: Count
    stop_sequences: Annotated[list[StopString], Meta(max_length=64)] | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    metadata: Json | None = None  # no effect
    service_tier: str | None = None  # no effect
    seed: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None = None  # ours, as the rest
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    logit_bias: Bias | None = None


def anthropic_chat(body: CountTokensBody, facts: ModelFacts) -> ChatRequest:
    """The request in OpenAI's terms. Raises RequestError naming the field that is wrong."""
    offered = [_tool(tool, f"tools[{n}]") for n, tool in enumerate(body.tools or [])]
    tools = [tool for tool in offered if tool is not None]
    left_out = [{"type": t.type} for t, f in zip(body.tools or (), offered, strict=True) if not f]
    choice = body.tool_choice or ToolChoice("auto")
    thinking = body.thinking or ThinkingConfig("disabled")
    is_thinking = thinking.type != "disabled"
    messages, prefill = _split_prefill(_messages(body))
    if body.enable_thinking is not None:
        is_thinking = body.enable_thinking
    if prefill:  # the reply has begun, so there is no thinking before it
        is_thinking = False
    chat = ChatBody(
        messages=messages,
        model=body.model,
        tools=tools or None,
        tool_choice=_tool_choice(choice, {tool["function"]["name"] for tool in tools}),
        parallel_tool_calls=not choice.disable_parallel_tool_use,
        thinking_token_budget=thinking.budget_tokens,
        chat_template_kwargs={
            "enable_thinking": is_thinking,
            **(body.chat_template_kwargs or {}),
        },
        response_format=_response_format(body),
    )
    if isinstance(body, MessagesBody):
        chat.max_tokens, chat.stop = body.max_tokens, body.stop_sequences
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
        chat.min_p, chat.repetition_penalty = body.min_p, body.repetition_penalty
        chat.seed, chat.ignore_eos, chat.logit_bias = body.seed, body.ignore_eos, body.logit_bias
    request = chat_request(chat, facts)
    names = kinds_of(left_out)
    return dataclasses.replace(request, split_reasoning=True, left_out=names, prefill=prefill)


def _split_prefill(messages: list[Json]) -> tuple[list[Json], str]:
    """The messages, and the text of the assistant's that is the last one: the reply goes on from
    there. Raises RequestError if a call is in it."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return messages, ""
    if messages[-1].get("tool_calls"):
        raise wrong("messages", "the last one is the assistant's and has a call without a result")
    return messages[:-1], messages[-1]["content"]


def _messages(body: CountTokensBody) -> list[Json]:
    messages: list[Json] = []
    system = [block for block in _blocks(body.system or []) if not _is_volatile(block)]
    if system:
        messages.append({"role": "system", "content": _plain(system, "system")})
    last = len(body.messages) - 1
    for n, turn in enumerate(body.messages):
        where = f"messages[{n}].content"
        match turn.role:
            case "user":
                messages += _user(turn.content, where, n == last)
            case "assistant":
                messages.append(_assistant(turn.content))
            case "system":
                messages.append({"role": "system", "content": _plain(turn.content, where)})
    return messages if body.messages else []


def _user(content: Blocks, where: str, is_new: bool) -> list[Json]:
    """Text and tool results, in their order. Raises RequestError for other blocks of a new turn;
    the results of tools are history."""
    messages: list[Json] = []
    texts: list[str] = []

    def flush() -> None:
        if texts:
            messages.append({"role": "user", "content": "\n".join(texts)})
            texts.clear()

    for n, block in enumerate(_blocks(content)):
        place = f"{where}[{n}]"
        kind = block.get("type")
        if kind == "tool_result":
            flush()
            result = _joined(block.get("content"))
            if block.get("is_error") is True:
                result = f"Error: {result}"
            call_id = string_at(block, "tool_use_id", place) if is_new else block.get("tool_use_id")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": result})
        elif kind == "text" and is_new:
            texts.append(string_at(block, "text", place))
        elif is_new and not _is_text_document(block):
            raise _unknown(place, kind)
        else:
            texts.append(text_in(block))
    flush()
    return messages or [{"role": "user", "content": ""}]


def _is_text_document(block: Json) -> bool:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    return block.get("type") == "document" and kind in ("text", "content")


def _assistant(content: Blocks) -> Json:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    for block in _blocks(content):
        match block.get("type"):
            case "thinking":
                thoughts.append(text_in(block.get("thinking")))
            case "tool_use":
                arguments = call_arguments(block.get("input"))
                called = {"name": name_of(block.get("name")), "arguments": arguments}
                calls.append({"id": block.get("id"), "type": "function", "function": called})
            case "redacted_thinking":
                pass  # only its author can read it
            case _:
                texts.append(text_in(block))
    # Reasoning is a string even if there is none, so that none is searched in the text.
    message: Json = {"role": "assistant", "content": "\n".join(texts)}
    message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _joined(content: Any) -> str:
    """The text of a tool's result."""
    return "\n".join(map(text_in, content)) if isinstance(content, list) else text_in(content)


def _plain(content: Any, where: str) -> str:
    """Text alone: of a system prompt."""
    texts = []
    for n, block in enumerate(_blocks(content)):
        if block.get("type") != "text":
            raise _unknown(f"{where}[{n}]", block.get("type"))
        texts.append(string_at(block, "text", f"{where}[{n}]"))
    return "\n".join(texts)


def _is_volatile(block: Json) -> bool:
    return str(block.get("text", "")).startswith(_VOLATILE_BLOCK)


def _blocks(content: Blocks) -> list[Json]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _unknown(where: str, kind: Any) -> Exception:
    return wrong(where, f"this model reads text, not blocks of type {kind!r:.60}")


def _tool(tool: Tool, where: str) -> Json | None:
    """A tool of the client's; None if a server would run it."""
    if tool.type not in (None, "custom"):
        return None if tool.name is None else built_in(tool.type, tool.name)
    if tool.name is None:
        raise wrong(f"{where}.name", "is missing")
    if tool.input_schema is None:
        raise wrong(f"{where}.input_schema", "is missing")
    return function(tool.name, tool.description, tool.input_schema, tool.strict)


def _tool_choice(choice: ToolChoice, names: set[str]) -> str | Json:
    match choice.type:
        case "any":
            if not names:
                raise wrong("tool_choice", "'any' needs tools")
            return "required"
        case "tool":
            if choice.name not in names:
                raise wrong("tool_choice.name", f"{choice.name!r:.80} is not among the tools")
            return {"type": "function", "function": {"name": choice.name}}
    return choice.type


def _response_format(body: CountTokensBody) -> Json | None:
    form, where = body.output_format, "output_format"
    if body.output_config is not None and body.output_config.format is not None:
        form, where = body.output_config.format, "output_config.format"
    if form is None:
        return None
    if form.get("type") != "json_schema":
        raise wrong(f"{where}.type", "must be 'json_schema'")
    if not isinstance(form.get("schema"), dict):
        raise wrong(f"{where}.schema", "must be an object")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form["schema"]}}
