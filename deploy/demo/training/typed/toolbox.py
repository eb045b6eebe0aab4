"""Tools in the style of guides and agents, and requests for them, by the rules of `intents.txt`.

Names, descriptions and parameters of a tool are drawn anew for every dialogue, so a call is found by
the meaning of the request and of the tool's text.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..words import FLAGS, PARAMETERS, Source
from .grammar import expand, request_frame
from .style import typed
from .values import MAKERS, Maker, Value, enum

Json = dict[str, Any]
_SLOT = re.compile(r"(\w+)=([\w()/]+): (.*?) = (.*)")


@dataclass(frozen=True)
class Slot:
    """A parameter: rules for its name and description, and the maker of its values."""

    name: str
    maker: Maker
    names: str
    about: str
    required: bool


@dataclass
class Intent:
    """A task that tools can do, with the rules for its tools and requests."""

    family: str
    name: str
    is_alone: bool  # no other tool of the family is offered beside its tool
    names: tuple[str, ...] = ()
    about: str = ""
    slots: list[Slot] = field(default_factory=list)
    tails: dict[str, str] = field(default_factory=dict)
    asks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TypedTool:
    """A tool for an intent. `parameters` has the name of the parameter for each slot it takes."""

    intent: Intent
    declaration: Json
    parameters: dict[str, str]

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.declaration["function"]["name"])


@dataclass(frozen=True)
class TypedCall:
    """A call of a tool."""

    tool: TypedTool
    arguments: Json

    def message_part(self) -> Json:
        """Its entry in an assistant message's `tool_calls`."""
        return {
            "type": "function",
            "function": {"name": self.tool.name, "arguments": self.arguments},
        }


@functools.cache
def intents() -> tuple[Intent, ...]:
    """All intents of `intents.txt`. Raises ValueError for a line that has no meaning."""
    found: list[Intent] = []
    for line in Path(__file__).with_name("intents.txt").read_text().splitlines():
        key, _, rest = line.strip().partition(" ")
        if not key or key == "#":
            continue
        if key == "=":
            name, _, alone = rest.partition(" ")
            found.append(Intent(name.partition("/")[0], name, alone == "~"))
            continue
        _add_line(found[-1], key, rest)
    return tuple(found)


def _add_line(intent: Intent, key: str, rest: str) -> None:
    match key:
        case "name":
            intent.names = tuple(rest.split("|"))
        case "about":
            intent.about = f"[{rest}]"
        case "ask":
            intent.asks.append(rest)
        case "with":
            slot, _, rule = rest.partition(": ")
            intent.tails[slot] = f"[{rule}]"
        case "need" | "may":
            match = _SLOT.fullmatch(rest)
            if not match:
                raise ValueError(f"{intent.name}: not a slot: {rest}")
            name, kind, names, about = match.groups()
            is_enum = kind.startswith("enum(")
            maker = enum(kind[5:-1].split("/")) if is_enum else MAKERS[kind]
            intent.slots.append(Slot(name, maker, f"[{names}]", f"[{about}]", key == "need"))
        case _:
            raise ValueError(f"{intent.name}: no such line: {key}")


def make_tool(s: Source, intent: Intent) -> TypedTool:
    """A tool for the intent."""
    camel = s.chance(0.2)
    parameters: dict[str, str] = {}
    properties: Json = {}
    described = s.chance(0.65)
    slots = [slot for slot in intent.slots if slot.required or s.chance(0.7)]
    if s.chance(0.2):
        s.rng.shuffle(slots)
    for slot in slots:
        name = _parameter_name(s, slot, camel, properties)
        parameters[slot.name] = name
        properties[name] = dict(slot.maker.schema)
        if described and s.chance(0.85):
            properties[name]["description"] = _filled(s, slot.about)
    for _ in range(s.pick((0, 0, 0, 1, 2))):  # parameters that requests never name
        spare = s.word(FLAGS) if s.chance(0.5) else s.word(PARAMETERS)
        kind = "boolean" if spare in FLAGS else s.pick(("string", "integer"))
        if not _means_the_same(spare, slots):
            properties.setdefault(spare, {"type": kind})
    schema: Json = {"type": "object", "properties": properties}
    required = [parameters[slot.name] for slot in slots if slot.required]
    if required or s.chance(0.5):
        schema["required"] = required
    if s.chance(0.15):
        schema["additionalProperties"] = False
    function: Json = {"name": _tool_name(s, intent)}
    opaque = function["name"] not in intent.names
    if opaque or s.chance(0.93):
        function["description"] = _filled(s, intent.about)
    function["parameters"] = schema
    return TypedTool(intent, {"type": "function", "function": function}, parameters)


def _means_the_same(name: str, slots: Sequence[Slot]) -> bool:
    """Whether the name is one that a slot might have, of this tool or of the same intent."""
    return any(re.search(rf"\b{name}\b", slot.names) for slot in slots)


def _parameter_name(s: Source, slot: Slot, camel: bool, taken: Json) -> str:
    while True:
        name = expand(s.rng, slot.names)
        if camel:
            head, *tail = name.split("_")
            name = head + "".join(part.capitalize() for part in tail)
        if name not in taken:
            return name


def _tool_name(s: Source, intent: Intent) -> str:
    name = s.pick(intent.names)
    kind = s.number(0, 19)
    if kind == 0:
        return s.pseudo_word()  # the description must be read
    if kind == 1:
        return f"{s.pseudo_word()}_{name}"
    if kind == 2:
        return f"mcp__{s.pseudo_word()}__{name}"
    if kind == 3:
        return f"{name}_{s.pick(('v2', 'tool', 'api', 'fn'))}"
    return name


def _filled(s: Source, rule: str) -> str:
    text = expand(s.rng, rule)
    return text.replace("{city}", s.name()).strip()


def make_tools(s: Source, wanted: Sequence[Intent], count: int) -> list[TypedTool]:
    """Tools for the wanted intents and for up to `count` other ones, shuffled. No two can do the
    same, and all names differ."""
    chosen = list(wanted)
    for intent in s.rng.sample(intents(), min(len(intents()), 2 * count + 4)):
        if len(chosen) >= count + len(wanted):
            break
        if not any(_is_alike(intent, other) for other in chosen):
            chosen.append(intent)
    s.rng.shuffle(chosen)
    tools: dict[str, TypedTool] = {}
    for intent in chosen:
        tool = make_tool(s, intent)
        while tool.name in tools:
            tool = make_tool(s, intent)
        tools[tool.name] = tool
    return list(tools.values())


def _is_alike(one: Intent, other: Intent) -> bool:
    """Whether tools for the two would be hard to tell apart for a person."""
    if one.name == other.name:
        return True
    return one.family == other.family and (one.is_alone or other.is_alone)


def missing_intent(s: Source, tools: Sequence[TypedTool]) -> Intent | None:
    """An intent that none of the tools can serve. Often a tool of its family is there. None: the
    tools can do everything."""
    there = [tool.intent for tool in tools]
    fits = [i for i in intents() if not any(_is_alike(i, other) for other in there)]
    families = {intent.family for intent in there}
    near = [intent for intent in fits if intent.family in families]
    if not fits:
        return None
    return s.pick(near if near and s.chance(0.5) else fits)


def request(s: Source, tool: TypedTool) -> tuple[str, TypedCall]:
    """A text that asks for a call of the tool, and the call."""
    values = _values(s, tool)
    text = _frame(s, tool.intent, values)
    return _text(text, values), _call(tool, values)


def request_several(s: Source, tool: TypedTool, count: int) -> tuple[str, list[TypedCall]] | None:
    """A text that asks for `count` calls which differ in one value. None: the intent has no value
    that could differ."""
    values = _values(s, tool)
    plain = {k for k, v in values.items() if isinstance(v.value, str) and v.said == v.value}
    free = [slot for slot in tool.intent.slots if slot.required and "enum" not in slot.maker.schema]
    names = [slot.name for slot in free if slot.name in plain]
    names = [name for name in names if len(values[name].value.split()) <= 3]
    if not names:
        return None
    name = s.pick(names)
    slot = next(slot for slot in tool.intent.slots if slot.name == name)
    several = s.sample(lambda: slot.maker.make(s).value, count)
    last = s.pick((" and ", " and ", ", ", " & ", " and also "))
    said = ", ".join(several[:-1]) + last + several[-1]
    text = _text(_frame(s, tool.intent, values), {**values, name: Value(said, "")})
    if s.chance(0.12):
        text += s.pick((", both please", ", one after the other", ". All of them.", " - each"))
    return text, [_call(tool, {**values, name: Value(v, v)}) for v in several]


def _values(s: Source, tool: TypedTool) -> dict[str, Value]:
    values = {}
    for slot in tool.intent.slots:
        if slot.required or (slot.name in tool.parameters and s.chance(0.5)):
            values[slot.name] = slot.maker.make(s)
    return values


def _frame(s: Source, intent: Intent, values: dict[str, Value]) -> str:
    tails = [intent.tails[name] for name in values if name in intent.tails]
    s.rng.shuffle(tails)

    def with_tails(frame: str) -> str:
        for rule in tails:
            mark = frame[-1:] if frame[-1:] in "?." else ""
            tail = expand(s.rng, rule)
            if s.chance(0.25):
                frame = f"{frame.rstrip('?')}{mark or '.'} {tail[:1].upper()}{tail[1:]}"
            else:
                frame = f"{frame.rstrip('?.')}{s.pick((' ', ' ', ', '))}{tail}{mark}"
        return frame

    return typed(s, request_frame(s, intent.asks, with_tails))


def _text(frame: str, values: dict[str, Value]) -> str:
    for name, value in values.items():
        frame = frame.replace(f"{{{name}}}", value.said)
    return frame


def _call(tool: TypedTool, values: dict[str, Value]) -> TypedCall:
    """The call, with arguments in the order of the tool's parameters."""
    names = tool.parameters.items()
    return TypedCall(tool, {name: values[slot].value for slot, name in names if slot in values})
