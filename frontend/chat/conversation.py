"""Chat messages of a request -> what the chat template can render faithfully.

The template drops or mangles what it does not know (see its rules for null content, list content,
argument strings and the developer role), so all of that is put right, or refused, here.
"""

from typing import Any

import msgspec

from ..wire.schema import wrong

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_TEXT_PARTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
_NEEDS_CONTENT = ("system", "user")
_MAX_NAME = 256
Json = dict[str, Any]


def normalise_messages(messages: list[Json]) -> list[Json]:
    """New messages with string content, object arguments and no nulls.

    Raises RequestError naming the message and key that cannot be rendered.
    """
    if not messages:
        raise wrong("messages", "must not be empty")
    return [_normalise(message, f"messages[{n}]") for n, message in enumerate(messages)]


def check_tools(tools: list[Json] | None) -> list[Json] | None:
    """Tools as the template gets them: the client's objects, unset keys dropped; None if empty."""
    for n, tool in enumerate(tools or []):
        where = f"tools[{n}]"
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise wrong(where, "must be {type: 'function', function: {...}}")
        _check_name(function.get("name"), f"{where}.function.name")
        if not isinstance(function.get("parameters") or {}, dict):
            raise wrong(f"{where}.function.parameters", "must be an object")
    return [{**_no_nulls(t), "function": _no_nulls(t["function"])} for t in tools or []] or None


def _check_name(name: Any, where: str) -> None:
    """A name that the model could not write, or that would end early, can never be called."""
    if not isinstance(name, str) or not name:
        raise wrong(where, "must be a string")
    if len(name) > _MAX_NAME or name != name.strip() or not set("\n<>").isdisjoint(name):
        raise wrong(where, f"at most {_MAX_NAME} characters, no spaces around, no newline, < or >")


def _normalise(message: Json, where: str) -> Json:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
    result = {**_no_nulls(message), "role": _ROLES[role]}
    if "content" in result:
        result["content"] = text_of(result["content"], f"{where}.content")
    elif _ROLES[role] in _NEEDS_CONTENT:
        raise wrong(f"{where}.content", f"is required for role {role}")
    for key in ("reasoning", "reasoning_content"):
        if not isinstance(result.get(key, ""), str):
            raise wrong(f"{where}.{key}", "must be a string")
    if role == "assistant":
        if "reasoning" in result:
            result.setdefault("reasoning_content", result["reasoning"])
        if "function_call" in result:  # the older spelling of a single call
            result.setdefault("tool_calls", [{"function": result.pop("function_call")}])
        if "tool_calls" in result:
            result["tool_calls"] = _calls(result["tool_calls"], f"{where}.tool_calls")
    return result


def text_of(content: Any, where: str) -> str:
    """The text of a content: a string, or a list of parts that are text under any of its names.
    Raises RequestError for others, such as images."""
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


def _calls(calls: Any, where: str) -> list[Json]:
    if not isinstance(calls, list):
        raise wrong(where, "must be a list")
    result = []
    for n, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong(f"{where}[{n}].function.name", "must be a string")
        arguments = _arguments(function.get("arguments"), f"{where}[{n}].function.arguments")
        result.append({**_no_nulls(call), "function": {**function, "arguments": arguments}})
    return result


def _arguments(arguments: Any, where: str) -> Json:
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise wrong(where, f"is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise wrong(where, "must be a JSON object")
    return arguments


def _no_nulls(value: Json) -> Json:
    return {k: v for k, v in value.items() if v is not None}
