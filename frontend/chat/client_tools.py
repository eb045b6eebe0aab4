"""Tools that a client runs itself but that are no functions: offered to the model as functions,
whose calls are written back in the client's form. Tools that only a provider could run are left
out."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ..wire.schema import Json, wrong

Kind = Literal["function", "custom", "local_shell", "shell", "apply_patch"]
_STRING = {"type": "string"}
_TEXTS = {"type": "array", "items": _STRING}
_CUT_INPUT = re.compile(r'\{\s*"input":\s*"(.*)', re.DOTALL)
_LONGEST_ESCAPE = 12


def _schema(*required: str, **properties: Any) -> Json:
    return {"type": "object", "properties": properties, "required": list(required)}


def _choice(*values: str) -> Json:
    return {"type": "string", "enum": list(values)}


_INPUT = _schema("input", input=_STRING)
_COUNT = {"type": "integer"}
_EDITS: Json = {"path": _STRING, "file_text": _STRING, "old_str": _STRING, "new_str": _STRING}
_EDITS |= {"insert_line": _COUNT, "view_range": {"type": "array", "items": _COUNT}}
# The arguments of each built-in tool, by the beginning of its type.
BUILT_IN: dict[str, tuple[str, Json]] = {
    "local_shell": (
        "Runs a command on the user's machine.",
        _schema("command", command=_TEXTS, working_directory=_STRING, timeout_ms=_COUNT),
    ),
    "shell": (
        "Runs shell commands on the user's machine.",
        _schema("commands", commands=_TEXTS, timeout_ms=_COUNT, max_output_length=_COUNT),
    ),
    "apply_patch": (
        "Creates, updates or deletes a file. The diff is in the V4A format.",
        _schema(
            *("type", "path"),
            type=_choice("create_file", "update_file", "delete_file"),
            path=_STRING,
            diff=_STRING,
        ),
    ),
    "bash": (
        "Runs a command in a bash session that stays open.",
        _schema(command=_STRING, restart={"type": "boolean"}),
    ),
    "text_editor": (
        "Views, creates and edits files.",
        _schema(
            *("command", "path"),
            command=_choice("view", "create", "str_replace", "insert"),
            insert_text=_STRING,
            **_EDITS,
        ),
    ),
    "memory": (
        "Keeps notes in files under /memories.",
        _schema(
            "command",
            command=_choice("view", "create", "str_replace", "insert", "delete", "rename"),
            insert_text=_STRING,
            old_path=_STRING,
            new_path=_STRING,
            **_EDITS,
        ),
    ),
}


@dataclass(frozen=True)
class ClientTool:
    """A function that stands for a tool of another kind."""

    kind: Kind
    name: str  # the client's
    namespace: str | None = None


Forms = dict[str, ClientTool]  # name of the function -> what it stands for


def function(name: str, description: str | None, parameters: Any, strict: Any = None) -> Json:
    """A tool as the chat template knows it."""
    fields: Json = {"name": name, "description": description, "parameters": parameters}
    if strict is not None:
        fields["strict"] = strict
    return {"type": "function", "function": fields}


def built_in(kind: str, name: str) -> Json | None:
    """The function for a tool whose parameters clients do not send; None if no client runs it."""
    for prefix, (description, parameters) in BUILT_IN.items():
        if re.fullmatch(rf"{prefix}(_\d+)?", kind):
            return function(name, description, parameters)
    return None


def free_text(tool: Json, where: str) -> Json:
    """The function for a tool {name, description, format} that takes any text."""
    name = tool.get("name")
    if not isinstance(name, str) or not name:
        raise wrong(f"{where}.name", "must be a string")
    description = tool.get("description") or ""
    form = tool.get("format")
    form = form.get("grammar", form) if isinstance(form, dict) else {}
    if isinstance(form, dict) and isinstance(form.get("definition"), str):
        rule = f"The input must match this {form.get('syntax')} grammar:\n{form['definition']}"
        description = f"{description}\n\n{rule}".strip()
    return function(name, description or None, _INPUT)


def qualified(namespace: Any, name: str) -> str:
    """The function's name of a tool in a group."""
    if not isinstance(namespace, str) or not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def input_text(arguments: str) -> str:
    """The text that a free-text tool gets. If the output was cut off, as much as there is."""
    try:
        value = msgspec.json.decode(arguments, type=dict[str, Any]).get("input", "")
        return value if isinstance(value, str) else msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, RecursionError):
        cut = _CUT_INPUT.match(arguments)
    text = cut[1] if cut else ""
    for length in range(len(text), max(-1, len(text) - _LONGEST_ESCAPE - 1), -1):
        try:
            return msgspec.json.decode(f'"{text[:length]}"', type=str)
        except msgspec.MsgspecError:
            continue
    return ""


def own_arguments(arguments: str) -> Json:
    """The arguments of a built-in tool; {} if the output was cut off."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return {}


def kinds_of(tools: Iterable[Json]) -> tuple[str, ...]:
    """Names of tools for a note that they are left out."""
    return tuple(f"tools.{tool.get('type')!s:.60}" for tool in tools)
