"""A body of /v1/chat/completions, or of a route that is translated to it -> `ChatRequest`.

The chat template drops or mangles what it does not know: null content, lists of content parts,
arguments as strings, the developer role. All of that is normalised or refused here, history never
refused (`history.py`). Sampling
parameters are checked in `engine/params.py`.
"""

from dataclasses import dataclass, field
from typing import Any

from ..engine.constraints import ToolRules
from ..engine.params import GenerationSpec, ModelFacts, openai_spec, refuse
from ..wire.schema import UNSUPPORTED_CHAT, ChatBody, Json, wrong
from .client_tools import ClientTool, Forms, free_text, kinds_of
from .history import call_arguments, name_of, text_in

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_TEXT_PARTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
_MAX_NAME = 256


@dataclass(frozen=True)
class ChatRequest:
    """A request of a chat route, checked, in OpenAI's terms."""

    messages: list[Json]  # from `normalise_messages`
    spec: GenerationSpec  # with response_format and logprobs
    tools: ToolRules | None  # None: no tools, or tool_choice "none", which hides them
    template_kwargs: Json  # the template's own arguments: enable_thinking, ...
    separate_reasoning: bool  # False: reasoning is joined in front of the content
    include_reasoning: bool  # False: reasoning is not sent
    split_reasoning: bool = False  # also without --reasoning_parser
    forms: Forms = field(default_factory=dict)  # of tools that are no functions
    left_out: tuple[str, ...] = ()  # fields of the body that have no effect
    prefill: str = ""  # the beginning of the reply
    thinking_budget: int = -1  # most tokens of the reasoning; -1: no limit


def chat_request(body: ChatBody, facts: ModelFacts) -> ChatRequest:
    """Raises RequestError naming the field that is wrong."""
    if body.function_call not in (None, "none"):
        raise wrong("function_call", "not supported, use tools")
    if body.functions:
        raise wrong("functions", "not supported, use tools")
    refuse(body, UNSUPPORTED_CHAT)
    if body.top_logprobs is not None and not body.logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else -1
    max_tokens = body.max_completion_tokens or body.max_tokens
    tools, forms, left_out = offer(body.tools)
    return ChatRequest(
        spec=openai_spec(body, facts, max_tokens, num_logprobs),
        messages=normalise_messages(body.messages),
        tools=tool_rules(body, tools) if tools or body.tool_choice is not None else None,
        template_kwargs=template_kwargs(body, facts),
        separate_reasoning=body.separate_reasoning is not False,
        include_reasoning=body.include_reasoning is not False,
        forms=forms,
        left_out=left_out,
        thinking_budget=_thinking_budget(body, facts),
    )


def template_kwargs(body: ChatBody, facts: ModelFacts) -> Json:
    """Arguments of the template besides messages and tools. chat_template_kwargs override the
    other fields."""
    overrides = _without_nulls(body.chat_template_kwargs or {})
    thinking = overrides.get("enable_thinking", overrides.get("thinking"))
    if thinking is None:
        thinking = body.enable_thinking
    if thinking is None and body.thinking is not None:
        thinking = body.thinking.type != "disabled"
    if thinking is None and body.reasoning_effort == "none":
        thinking = False
    clear_thinking = False if facts.config.preserve_thinking else None  # None: template's default
    if body.thinking is not None and body.thinking.clear_thinking is not None:
        clear_thinking = body.thinking.clear_thinking
    kwargs: Json = {
        "reasoning_effort": body.reasoning_effort,
        "role_settings": body.role_settings,
        "character_settings": body.character_settings,
        "clear_thinking": clear_thinking,
        "enable_thinking": thinking,
        "thinking": thinking,
    }
    return _without_nulls(kwargs) | overrides


def _thinking_budget(body: ChatBody, facts: ModelFacts) -> int:
    budget = body.thinking_token_budget
    if budget is None and body.thinking is not None:
        budget = body.thinking.budget_tokens
    if budget is None:
        budget = facts.config.thinking_token_budget
    limit = facts.config.max_thinking_token_budget
    return limit if limit >= 0 and (budget > limit or budget < 0) else budget


# --- messages ---


def normalise_messages(messages: list[Json]) -> list[Json]:
    """New messages with string content, object arguments and no nulls.

    Raises RequestError naming the message and key that cannot be rendered: a role that there is
    not, or content of the last message or of a system message that is not text. Elsewhere it is
    replaced (`history.py`).
    """
    if not messages:
        raise wrong("messages", "must not be empty")
    last = len(messages) - 1
    return [_normalise(message, f"messages[{n}]", n == last) for n, message in enumerate(messages)]


def _normalise(message: Json, where: str, is_new: bool) -> Json:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
    result = {**_without_nulls(message), "role": _ROLES[role]}
    if _ROLES[role] == "system" or (_ROLES[role] == "user" and is_new):
        if "content" not in result:
            raise wrong(f"{where}.content", f"is required for role {role}")
        result["content"] = text_of(result["content"], f"{where}.content")
    elif "content" in result or _ROLES[role] == "user":
        result["content"] = text_in(result.get("content"))
    if role == "assistant":
        _normalise_assistant(result)
    return result


def _normalise_assistant(message: Json) -> None:
    """Bring reasoning and tool calls into the form that the template knows."""
    for key in ("reasoning", "reasoning_content"):
        if key in message:
            message[key] = text_in(message[key])
    if "reasoning" in message:
        message.setdefault("reasoning_content", message["reasoning"])
    if "function_call" in message:  # the older spelling of a single call
        message.setdefault("tool_calls", [{"function": message.pop("function_call")}])
    calls = message.get("tool_calls")
    if "tool_calls" in message:
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [_tool_call(call) for call in calls if isinstance(call, dict)]


def text_of(content: Any, where: str) -> str:
    """The text of a content: a string, or a list of parts that are text under any of its names.
    Raises RequestError for other parts, such as images."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(where, "must be a string or a list of text parts")
    return "".join(_part_text(part, f"{where}[{n}]") for n, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "refusal":
        return string_at(part, "refusal", where)
    if kind not in _TEXT_PARTS:
        raise wrong(where, f"this model reads text parts only, not {kind!r:.60}")
    return string_at(part, "text", where)


def string_at(item: Json, key: str, where: str) -> str:
    """`item[key]`. Raises RequestError unless it is a string."""
    value = item.get(key)
    if not isinstance(value, str):
        raise wrong(f"{where}.{key}", "must be a string")
    return value


def _tool_call(call: Json) -> Json:
    custom, function = call.get("custom"), call.get("function")
    if isinstance(custom, dict):
        function = {
            "name": custom.get("name"),
            "arguments": {"input": text_in(custom.get("input"))},
        }
    function = function if isinstance(function, dict) else {}
    called: Json = {"name": name_of(function.get("name"))}
    called["arguments"] = call_arguments(function.get("arguments"))
    return {**_without_nulls(call), "function": {**function, **called}}


def _without_nulls(value: Json) -> Json:
    return {k: v for k, v in value.items() if v is not None}


# --- tools ---


def check_tools(tools: list[Json] | None) -> list[Json] | None:
    """Tools as the template gets them: `offer` without the rest."""
    return offer(tools)[0]


def offer(tools: list[Json] | None) -> tuple[list[Json] | None, Forms, tuple[str, ...]]:
    """Tools as the template gets them: the client's functions without nulls, or None if there are
    none; what they stand for, if they are no functions; the kinds of tools that are left out."""
    offered: list[Json] = []
    forms: Forms = {}
    others: list[Json] = []
    for n, tool in enumerate(tools or []):
        where, kind = f"tools[{n}]", tool.get("type", "function")
        custom = tool.get("custom")
        if kind == "custom" and isinstance(custom, dict):
            tool = free_text(custom, f"{where}.custom")
            forms[custom["name"]] = ClientTool("custom", custom["name"])
        elif isinstance(kind, str) and kind not in ("function", "custom"):
            others.append(tool)
            continue
        _check_function(tool, where)
        offered.append({**_without_nulls(tool), "function": _without_nulls(tool["function"])})
    return offered or None, forms, kinds_of(others)


def _check_function(tool: Json, where: str) -> None:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise wrong(where, "must be {type: 'function', function: {...}}")
    _check_name(function.get("name"), f"{where}.function.name")
    if not isinstance(function.get("parameters") or {}, dict):
        raise wrong(f"{where}.function.parameters", "must be an object")


def _check_name(name: Any, where: str) -> None:
    """Refuse a name that the model cannot write: such a tool could never be called."""
    if not isinstance(name, str) or not name:
        raise wrong(where, "must be a string")
    if len(name) > _MAX_NAME or name != name.strip() or not set("\n<>").isdisjoint(name):
        raise wrong(where, f"at most {_MAX_NAME} characters, no spaces around, no newline, < or >")


def tool_rules(body: ChatBody, tools: list[Json] | None) -> ToolRules | None:
    """The tools that the model sees and may call; None if it sees none."""
    parallel = body.parallel_tool_calls is not False
    match body.tool_choice:
        case None | "auto":
            return ToolRules(tools, parallel=parallel) if tools else None
        case "none":
            return None
        case "required":
            if not tools:
                raise wrong("tool_choice", "'required' needs tools")
            return ToolRules(tools, "required", parallel=parallel)
        case str():
            raise wrong("tool_choice", "must be 'none', 'auto', 'required' or name a function")
        case {"type": "function" | "custom"}:
            name = _tool_name(body.tool_choice, tools, "tool_choice")
            return ToolRules(tools or [], "required", name, parallel=parallel)
        case {"type": "allowed_tools"}:
            return _allowed_tools(body.tool_choice.get("allowed_tools"), tools, parallel)
    raise wrong("tool_choice", "must be a mode, or an object of type function or allowed_tools")


def _allowed_tools(allowed: Any, tools: list[Json] | None, parallel: bool) -> ToolRules:
    where = "tool_choice.allowed_tools"
    choice = allowed.get("mode") if isinstance(allowed, dict) else None
    chosen = allowed.get("tools") if isinstance(allowed, dict) else None
    if choice not in ("auto", "required") or not isinstance(chosen, list) or not chosen:
        raise wrong(where, "must be {mode: 'auto' or 'required', tools: [...]}")
    names = [_tool_name(tool, tools, f"{where}.tools[{n}]") for n, tool in enumerate(chosen)]
    return ToolRules(tools or [], choice, None, frozenset(names), parallel)


def _tool_name(tool: Any, tools: list[Json] | None, where: str) -> str:
    """The name in {type: 'function', function: {name: ...}}, which must be a declared tool's."""
    function = tool.get(tool.get("type", "function")) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise wrong(where, "must be {type: 'function', function: {name: ...}}")
    if name not in {tool["function"]["name"] for tool in tools or []}:
        raise wrong(f"{where}.function.name", f"{name!r:.80} is not among the tools")
    return name
