"""Earlier items of a conversation -> text that the model can read.

History is data. An agent cannot take back what a tool returned or what another model wrote, so an
item that no code here can read must not make every later request fail. It becomes its text, or a
note such as "[image omitted]".
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import msgspec

from ...shared.errors import RequestError
from ..wire.schema import Json, decode_text

_MAX_LEVELS = 100  # of a call's arguments
_LONG = 1024  # characters of a call's arguments
_TOO_DEEP = "[deeply nested value omitted]"
_NAMES = {"image_url": "image", "input_image": "image", "input_audio": "audio"}
_NAMES |= {"input_file": "file", "tool_reference": "tool"}
_TEXT_KEYS = ("text", "refusal", "content", "output")
_TITLE_KEYS = ("title", "name", "tool_name", "filename", "server_name")
_SILENT = ("thinking", "redacted_thinking")


def text_in(value: Any) -> str:
    """All text of a content, a part of it, or whatever stands in its place."""
    try:
        return _text_in(value)
    except RecursionError:
        return _TOO_DEEP


def _text_in(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_text_in, value))
    return _text_of_part(value) if isinstance(value, dict) else as_json(value)


def _text_of_part(part: Json) -> str:
    for key in _TEXT_KEYS:
        if isinstance(part.get(key), str | list):
            return _text_in(part[key])
    source = part.get("source") or part.get("resource")
    if isinstance(source, dict) and "text" in (source.get("type"), *source):
        return _text_in(source.get("text") or source.get("data"))
    if isinstance(source, dict) and source.get("type") == "content":
        return _text_in(source.get("content"))
    kind = part.get("type")
    if not isinstance(kind, str):
        return as_json(part)
    if kind in _SILENT:
        return ""
    title = next((part[key] for key in _TITLE_KEYS if isinstance(part.get(key), str)), "")
    note = f"{_NAMES.get(kind, kind):.60} omitted"
    return f"[{note}: {title:.200}]" if title else f"[{note}]"


def as_json(value: Any) -> str:
    """The JSON of a value."""
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError:
        return _TOO_DEEP


def name_of(value: Any) -> str:
    """The name of something that was called."""
    return value if isinstance(value, str) and value else "unknown"


def call_arguments(arguments: Any) -> Json:
    """The arguments of a call, from an object or its text. Whatever is no object, such as text that
    was cut off, becomes the only argument."""
    if arguments is None or arguments == "":
        return {}
    value = arguments
    if isinstance(value, str):
        try:
            value = decode_text(value, "arguments", Any)
        except RequestError:
            return {"arguments": arguments}
    if not isinstance(value, dict):
        return {"arguments": arguments}
    if _is_deep(value):
        return {"arguments": arguments if isinstance(arguments, str) else as_json(arguments)}
    if isinstance(arguments, str) and len(arguments) > _LONG and "\\u" not in arguments:
        # The values are decoded where the template is rendered.
        return dict(decode_text(arguments, "arguments", dict[str, msgspec.Raw]))
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_LEVELS):
        level = list(chain.from_iterable(map(_members, level)))
        if not level:
            return False
    return True


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
