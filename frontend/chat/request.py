"""A body of /v1/chat/completions, or of a route translated to it -> `ChatRequest`.

Every wish that reaches the chat template or the tools is checked here; messages and tool objects
themselves in `conversation.py`, sampling in `params.py`.
"""

from typing import Any

from ..engine.params import ModelFacts, openai_spec
from ..wire.schema import UNSUPPORTED_CHAT, ChatBody, refuse, wrong
from .chat import ChatRequest, Json
from .conversation import check_tools, normalise_messages


def chat_request(body: ChatBody, facts: ModelFacts) -> ChatRequest:
    """Raises RequestError naming the field that is wrong."""
    _refuse_unsupported(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else -1
    spec = openai_spec(body, facts, body.max_completion_tokens or body.max_tokens, num_logprobs)
    messages = normalise_messages(body.messages)
    tools = check_tools(body.tools)
    tool_choice, tool_name, callable_tools = _tool_choice(body.tool_choice, tools)
    return ChatRequest(
        messages=messages,
        spec=spec,
        tools=tools,
        tool_choice=tool_choice,
        tool_name=tool_name,
        callable_tools=callable_tools,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        template_kwargs=template_kwargs(body, facts),
        separate_reasoning=body.separate_reasoning is not False,
        include_reasoning=body.include_reasoning is not False,
    )


def _tool_choice(
    choice: Any, tools: list[Json] | None
) -> tuple[str, str | None, frozenset[str] | None]:
    """The mode, the name of the one tool to call, and the names of those that may be called."""
    if choice is None:
        return "auto", None, None
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise wrong("tool_choice", "must be 'none', 'auto', 'required' or name a function")
        if choice == "required" and not tools:
            raise wrong("tool_choice", "'required' needs tools")
        return choice, None, None
    if choice.get("type") == "allowed_tools":
        return _allowed_tools(choice.get("allowed_tools"), tools)
    if choice.get("type") != "function":
        raise wrong("tool_choice", "must be a mode, or an object of type function or allowed_tools")
    return "required", _name_of(choice, tools, "tool_choice"), None


def _allowed_tools(
    allowed: Any, tools: list[Json] | None
) -> tuple[str, str | None, frozenset[str] | None]:
    where = "tool_choice.allowed_tools"
    mode, chosen = (
        allowed.get(k) if isinstance(allowed, dict) else None for k in ("mode", "tools")
    )
    if mode not in ("auto", "required") or not isinstance(chosen, list) or not chosen:
        raise wrong(where, "must be {mode: 'auto' or 'required', tools: [...]}")
    names = [_name_of(one, tools, f"{where}.tools[{n}]") for n, one in enumerate(chosen)]
    return mode, None, frozenset(names)


def _name_of(one: Any, tools: list[Json] | None, where: str) -> str:
    """The declared tool that {type: 'function', function: {name: ...}} means."""
    function = one.get("function") if isinstance(one, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise wrong(where, "must be {type: 'function', function: {name: ...}}")
    if name not in {tool["function"]["name"] for tool in tools or []}:
        raise wrong(f"{where}.function.name", f"{name!r:.80} is not among the tools")
    return name


def template_kwargs(body: ChatBody, facts: ModelFacts) -> Json:
    """What the template is called with, besides messages and tools. What chat_template_kwargs say
    wins over the other fields."""
    given = {k: v for k, v in (body.chat_template_kwargs or {}).items() if v is not None}
    thinking = given.get("enable_thinking", given.get("thinking"))
    if thinking is None and body.thinking is not None:
        thinking = body.thinking.type == "enabled"
    if thinking is None and body.reasoning_effort == "none":
        thinking = False
    kwargs: Json = {
        "reasoning_effort": body.reasoning_effort,
        "role_settings": body.role_settings,
        "character_settings": body.character_settings,
        "clear_thinking": _clear_thinking(body, facts),
        "enable_thinking": thinking,
        "thinking": thinking,
    }
    return {name: value for name, value in kwargs.items() if value is not None} | given


def _clear_thinking(body: ChatBody, facts: ModelFacts) -> bool | None:
    """Whether the reasoning of earlier turns is left out; None: as the template has it."""
    if body.thinking is not None and body.thinking.clear_thinking is not None:
        return body.thinking.clear_thinking
    return False if facts.config.preserve_thinking else None


def _refuse_unsupported(body: ChatBody) -> None:
    if body.function_call not in (None, "none"):
        raise wrong("function_call", "not supported, use tools")
    if body.functions:
        raise wrong("functions", "not supported, use tools")
    refuse(body, UNSUPPORTED_CHAT)
