"""OpenAI's /v1/responses: the schema of its body, and its translation to chat terms.

Nothing is stored, so fields that refer to earlier responses are refused; `store` itself has no
visible effect. The items of a conversation are joined to messages: reasoning, text and calls that
follow each other are one turn of the assistant.
"""

import dataclasses
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ...shared.errors import RequestError
from ..chat.client_tools import (
    BUILT_IN,
    ClientTool,
    Forms,
    built_in,
    free_text,
    function,
    kinds_of,
    qualified,
)
from ..chat.history import call_arguments, name_of, text_in
from ..chat.request import ChatRequest, chat_request, string_at, text_of
from ..engine.params import ModelFacts
from ..wire.schema import (
    Bias,
    Budget,
    ChatBody,
    Count,
    Effort,
    Json,
    Penalty,
    StopStrings,
    Temperature,
    Tools,
    TopP,
    wrong,
)

_SPARE_LEVELS = 64
LOGPROBS = "message.output_text.logprobs"
_ARGUMENTS = ("arguments", "input", "action", "operation")  # keys of calls, by their type


class ReasoningConfig(Struct):
    """`reasoning`: effort "none" turns it off; it is never summarised."""

    effort: Effort | None = None
    max_tokens: Budget | None = None  # as `thinking_token_budget`
    summary: str | None = None
    generate_summary: str | None = None


class TextConfig(Struct):
    """`text`: the format of the reply's text."""

    format: Json | None = None
    verbosity: str | None = None


class ResponsesBody(Struct):
    """Body of /v1/responses."""

    input: str | Annotated[list[Json], Meta(max_length=10_000)]
    model: Annotated[str, Meta(max_length=256)] = "default"
    instructions: str | None = None
    tools: Tools | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Count | None = None
    max_tool_calls: Count | None = None  # no effect: the server runs no tools
    temperature: Temperature | None = None
    top_p: TopP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: Annotated[list[str], Meta(max_length=64)] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    enable_thinking: bool | None = None  # ours
    stream: bool | None = None
    stream_options: Json | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    metadata: Json | None = None  # this and the next have no effect
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # ours, as the rest
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None = None
    stop: StopStrings | None = None
    ignore_eos: bool | None = None
    logit_bias: Bias | None = None
    thinking_token_budget: Budget | None = None
    chat_template_kwargs: Json | None = None


def responses_chat(body: ResponsesBody, facts: ModelFacts) -> ChatRequest:
    """The request in chat terms. Raises RequestError naming the field that is wrong."""
    _refuse_state(body)
    _refuse_deep(body)
    tools, forms, left_out = _tools(body.tools or [])
    reasoning = body.reasoning or ReasoningConfig()
    budget = body.thinking_token_budget
    wants_logprobs = body.top_logprobs is not None or LOGPROBS in (body.include or ())
    chat = ChatBody(
        messages=_messages(body),
        model=body.model,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        stop=body.stop,
        ignore_eos=body.ignore_eos,
        logit_bias=body.logit_bias,
        logprobs=wants_logprobs or None,
        top_logprobs=body.top_logprobs,
        tools=tools or None,
        tool_choice=_tool_choice(body, forms),
        parallel_tool_calls=body.parallel_tool_calls,
        enable_thinking=body.enable_thinking,
        reasoning_effort=reasoning.effort,
        thinking_token_budget=reasoning.max_tokens if budget is None else budget,
        response_format=_response_format(body.text),
        chat_template_kwargs=body.chat_template_kwargs,
    )
    request = chat_request(chat, facts)
    if body.text and body.text.verbosity not in (None, "medium"):
        left_out = (*left_out, "text.verbosity")
    return dataclasses.replace(request, split_reasoning=True, forms=forms, left_out=left_out)


def _refuse_state(body: ResponsesBody) -> None:
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name) is not None:
            raise wrong(name, "nothing is stored here: send the whole conversation as input")
    if body.background:
        raise wrong("background", "not supported")


def _refuse_deep(body: ResponsesBody) -> None:
    """Refuse fields that are nested too deeply to be repeated in the reply, where they are nested
    deeper than in the request."""
    repeated: Any = [body.metadata, body.tools, body.tool_choice, body.text and body.text.format]
    for _ in range(_SPARE_LEVELS):
        repeated = [repeated]
    try:
        msgspec.json.encode(repeated)
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None


def _messages(body: ResponsesBody) -> list[Json]:
    messages: list[Json] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not body.input:
        raise wrong("input", "must not be empty")
    turn: Json | None = None  # the assistant's last turn, while items can be added
    last = len(body.input) - 1
    for n, item in enumerate(body.input):
        where = f"input[{n}]"
        kind = item.get("type") or ("message" if "role" in item else None)
        if not isinstance(kind, str) or kind == "item_reference":
            raise wrong(f"{where}.type", "must be the type of an item; nothing is stored here")
        message = _other_message(kind, item, where, n == last)
        if message is not None:
            turn = None
            messages.append(message)
            continue
        part = _assistant_part(kind, item)
        if turn is None or not _grow(turn, part):
            turn = {"role": "assistant", "content": "", **part}
            messages.append(turn)
    for message in messages:
        if message["role"] == "assistant":  # so that none is searched in the text
            message.setdefault("reasoning_content", "")
    return messages


def _assistant_part(kind: str, item: Json) -> Json:
    """The part of an assistant turn that an item is. Calls of tools that this server does not know
    are calls, if their results follow; all other items are text."""
    if kind == "reasoning":
        return {"reasoning_content": text_in(item.get("content") or item.get("summary"))}
    if kind == "message":
        return {"content": text_in(item.get("content"))}
    if kind.endswith("_call") and "call_id" in item:
        called = {"name": _called(kind, item), "arguments": _arguments(kind, item)}
        return {"tool_calls": [{"id": item["call_id"], "type": "function", "function": called}]}
    return {"content": text_in(item)}


def _called(kind: str, item: Json) -> str:
    return qualified(item.get("namespace"), name_of(item.get("name") or kind.removesuffix("_call")))


def _arguments(kind: str, item: Json) -> Json:
    """As the model wrote them: without what the client's form adds."""
    given = next((item[key] for key in _ARGUMENTS if item.get(key) is not None), None)
    if kind == "custom_tool_call":
        return {"input": text_in(given)}
    arguments = call_arguments(given)
    _, schema = BUILT_IN.get(kind.removesuffix("_call"), (None, None))
    if schema is None:
        return arguments
    return {key: value for key, value in arguments.items() if key in schema["properties"]}


def _grow(turn: Json, part: Json) -> bool:
    """Add a part to a turn. False if it breaks the order reasoning, text, calls."""
    calls = turn.get("tool_calls")
    if "tool_calls" in part:
        turn["tool_calls"] = [*(calls or []), *part["tool_calls"]]
        return True
    if calls or turn["content"] or ("reasoning_content" in part and "reasoning_content" in turn):
        return False
    turn.update(part)
    return True


def _other_message(kind: str, item: Json, where: str, is_new: bool) -> Json | None:
    """The message that an item is; None if it is part of a turn of the assistant."""
    if kind == "message":
        role = item.get("role")
        if role == "assistant":
            return None
        if role not in ("user", "system", "developer"):
            raise wrong(f"{where}.role", "must be user, assistant, system or developer")
        content = item.get("content")
        if is_new or role != "user":
            return {"role": role, "content": text_of(content, f"{where}.content")}
        return {"role": role, "content": text_in(content)}
    if not kind.endswith("_output"):
        return None
    if is_new:
        string_at(item, "call_id", where)
        if "output" not in item:
            raise wrong(f"{where}.output", "is missing")
    content = text_in(item.get("output"))
    return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}


def _tools(tools: list[Json]) -> tuple[list[Json], Forms, tuple[str, ...]]:
    """The tools that a client runs, as functions, and what they stand for; the kinds of the others,
    which are left out."""
    offered: list[Json] = []
    forms: Forms = {}
    others: list[Json] = []
    for n, tool in enumerate(tools):
        where, kind = f"tools[{n}]", tool.get("type")
        if kind == "namespace":
            group = [member for member in tool.get("tools") or () if isinstance(member, dict)]
            members = [_tool(member, where, tool.get("name")) for member in group]
        else:
            members = [_tool(tool, where)]
        for member in members:
            if member is None:
                others.append(tool)
            else:
                function, form = member
                offered.append(function)
                forms[function["function"]["name"]] = form
    return offered, forms, kinds_of(others)


def _tool(tool: Json, where: str, namespace: Any = None) -> tuple[Json, ClientTool] | None:
    kind, name = tool.get("type"), tool.get("name")
    match kind:
        case "custom":
            offered = free_text(tool, where)
        case "function":
            if not name or not isinstance(name, str):
                raise wrong(f"{where}.name", "must be a string")
            if not isinstance(tool.get("parameters") or {}, dict):
                raise wrong(f"{where}.parameters", "must be an object")
            fields = (tool.get("description"), tool.get("parameters"), tool.get("strict"))
            offered = function(name, *fields)
        case "local_shell" | "shell" | "apply_patch":
            found = built_in(kind, kind)
            assert found is not None, "it is in the table"
            return found, ClientTool(kind, kind)
        case _:
            return None
    form = ClientTool(kind, offered["function"]["name"], namespace)
    offered["function"]["name"] = qualified(namespace, form.name)
    return offered, form


def _tool_choice(body: ResponsesBody, forms: Forms) -> str | Json | None:
    choice = body.tool_choice
    if not isinstance(choice, dict):
        return choice
    several = choice.get("type") == "allowed_tools"
    chosen = choice.get("tools") if several else [choice]
    names = [_function_of(tool, forms) for tool in chosen] if isinstance(chosen, list) else [None]
    if None in names:
        raise wrong("tool_choice", "must be a mode, or {type: 'function', name: ...} of a tool")
    functions = [{"type": "function", "function": {"name": name}} for name in names]
    if not several:
        return functions[0]
    allowed = {"mode": choice.get("mode"), "tools": functions}
    return {"type": "allowed_tools", "allowed_tools": allowed}


def _function_of(tool: Any, forms: Forms) -> str | None:
    """The function that stands for a tool of tool_choice; None if none does."""
    if not isinstance(tool, dict):
        return None
    wanted = (tool.get("type"), tool.get("name", tool.get("type")))
    return next((n for n, form in forms.items() if (form.kind, form.name) == wanted), None)


def _response_format(text: TextConfig | None) -> Json | None:
    """text.format is chat's response_format without the inner object."""
    form = text.format if text else None
    if form is None or form.get("type") != "json_schema":
        return form
    inner = {key: form[key] for key in ("name", "schema", "strict", "description") if key in form}
    return {"type": "json_schema", "json_schema": inner}
