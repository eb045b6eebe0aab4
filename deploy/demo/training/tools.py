"""Tools with random names, descriptions and parameter schemas, and requests that need them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import frames
from .words import ADJECTIVES, FLAGS, PARAMETERS, VERBS, Source

Json = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A function as the client declares it, with the verb and object that describe its task."""

    name: str
    description: str
    verb: str
    object: str
    properties: Json  # name -> JSON schema
    required: tuple[str, ...]
    strict: bool

    def declaration(self) -> Json:
        """Its entry in a request's `tools`."""
        parameters: Json = {"type": "object", "properties": self.properties}
        if self.required or not self.strict:
            parameters["required"] = list(self.required)
        if self.strict:
            parameters["additionalProperties"] = False
        function: Json = {"name": self.name}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": parameters}}


@dataclass(frozen=True)
class Call:
    """A tool with arguments, in the order of its properties."""

    tool: Tool
    arguments: Json

    def message_part(self) -> Json:
        """Its entry in an assistant message's `tool_calls`."""
        return {
            "type": "function",
            "function": {"name": self.tool.name, "arguments": self.arguments},
        }


_DESCRIBE_PARAMETER = (
    "The {p}.", "The {p} to use.", "{P}", "{P} of the {object}", "Sets the {p}.", "What {p} to use",
    "{P} (see above)", "Which {p}", "The {p} of the {object}", "{P} wanted",
)  # fmt: skip
_DETERMINERS = ("the ", "the ", "the ", "my ", "this ", "its ", "our ", "a ")
_TRUE, _FALSE = ("true", "on", "yes", "enabled"), ("false", "off", "no", "disabled")


def make_tools(s: Source, count: int) -> list[Tool]:
    """`count` tools with different names and different pairs of verb and object. Some tools share
    the verb or the object."""
    tools: list[Tool] = []
    while len(tools) < count:
        tool = _make_tool(s, s.pick(tools) if tools and s.chance(_similar_share(s)) else None)
        taken = {t.name for t in tools} | {f"{t.verb} {t.object}" for t in tools}
        if tool.name not in taken and f"{tool.verb} {tool.object}" not in taken:
            tools.append(tool)
    return tools


def _similar_share(s: Source) -> float:
    """The share of tools that resemble another one. Training has more of them."""
    return 0.35 if s.frames_held_out else 0.45


def make_call(s: Source, tool: Tool) -> Call:
    """A call with random values. Optional arguments may be missing."""
    arguments = {
        name: _value(s, schema)
        for name, schema in tool.properties.items()
        if name in tool.required or s.chance(0.5)
    }
    return Call(tool, arguments)


def ask_for(s: Source, call: Call, first: bool | None = None) -> str:
    """A sentence that asks for the call and names every argument with its value. The arguments come
    `first` or not (None: seldom)."""
    tool = call.tool
    intent = _intent_frame(s).format(verb=tool.verb, object=tool.object)
    frame = _request_frame(s, s.chance(0.15) if first is None else first)
    before = frame.partition("{params}")[0].rstrip()
    inside = before[-1:].isalpha()  # the phrases continue a sentence that has begun
    phrases = [_phrase(s, name, call.arguments[name], tool.properties[name], inside)
               for name in s.rng.sample(list(call.arguments), len(call.arguments))]  # fmt: skip
    if not phrases:
        return _capital(intent)
    values = tool.properties.values()
    nested = any(schema["type"] in ("array", "object") for schema in values)
    if (len(phrases) > 1 and nested) or s.chance(0.2):
        params = s.pick(("; ", ". ", "\n")).join(phrases)
    elif len(phrases) > 1 and s.chance(0.7):
        params = f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    else:
        params = s.pick((", ", " and ")).join(phrases)
    texts = {"intent": intent, "params": params, "Params": recased(params, call, _capital)}
    return recased(frame.format(**texts), call, _capital)


def recased(text: str, call: Call, change: Callable[[str], str]) -> str:
    """The text with its first letter changed, unless that belongs to a value. The spelling of
    values must not change."""
    return text if text.startswith(tuple(_strings(call.arguments))) else change(text)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def intent_without_tool(s: Source, tools: Sequence[Tool]) -> Tool:
    """A tool whose task no tool of the list has. Often it shares its verb or object with one."""
    while True:
        similar = s.pick(tools) if tools and s.chance(_similar_share(s) + 0.15) else None
        tool = _make_tool(s, similar)
        if all((t.verb, t.object) != (tool.verb, tool.object) for t in tools):
            return tool


def tool_result(s: Source, keys: Sequence[str]) -> tuple[str, str, list[str]]:
    """A result: (text of the tool, the answer about it, values that the answer must contain)."""
    kind = s.number(0, 9)
    if kind == 0:
        message = f"{s.noun()} not found"
        return json.dumps({"error": message}), f"The tool failed: {message}.", [message]
    if kind <= 2:
        value = f"{s.noun()} {s.name()}" if s.chance(0.5) else s.digits(1, 5)
        return value, f"The result is {value}.", [value]
    names = s.sample(lambda: s.word(keys) if s.chance(0.8) else s.pseudo_word(), s.number(1, 3))
    values = [_result_value(s) for _ in names]
    said = [f"the {k} is {_plain(v)}" for k, v in zip(names, values, strict=True)]
    text = json.dumps(dict(zip(names, values, strict=True)))
    return text, f"{_capital(' and '.join(said))}.", [_plain(v) for v in values]


def _description_frame(s: Source) -> str:
    if s.frames_held_out or s.chance(0.75):
        end = s.frame(frames.DESCRIPTION_ENDS) if s.chance(0.5) else s.pick((".", "", "."))
        return (
            f"{s.frame(frames.DESCRIPTIONS)}{s.pick(frames.DESCRIPTION_ARTICLES)} {{object}}{end}"
        )
    verb = s.pick(("{verb}", "{verbs}"))
    return f"{s.fillers(0, 3)} {verb}{s.fillers(0, 1)} {{object}}{s.fillers(0, 3)}"


def _intent_frame(s: Source) -> str:
    if s.frames_held_out or s.chance(0.8):
        opener = f"{s.frame(frames.OPENERS)} " if s.chance(0.8) else ""
        end = s.frame(frames.CLOSERS) if s.chance(0.2) else ""
    else:
        opener, end = f"{s.fillers(1, 5, 0.05)} ".lstrip(), s.fillers(0, 1)
    return f"{opener}{{verb}}{s.pick(frames.ARTICLES)} {{object}}{end}"


def _request_frame(s: Source, first: bool) -> str:
    if s.frames_held_out or s.chance(0.8):
        return s.frame(frames.PARAMETERS_FIRST if first else frames.REQUESTS)
    mark = s.pick((",", ":", ";", " -", ".", "?"))
    if first:
        return f"{s.fillers(0, 2)} {{params}}{mark}{s.fillers(0, 2)} {{intent}}".strip()
    if s.chance(0.2):
        return f"{{intent}}{s.fillers(1, 3)} {{params}}"
    return f"{{intent}}{mark}{s.fillers(0, 3, 0.05)} {{params}}"


def _parameter_frame(s: Source, inside: bool) -> str:
    """A frame for one argument. `inside` a sentence it is mostly no sentence itself. Training also
    has odd frames, in which the value is the last word, or the first one that is no filler."""
    if s.frames_held_out or s.chance(0.8):
        any_frame = not inside or (not s.frames_held_out and s.chance(0.3))
        while True:
            frame = s.frame(frames.PARAMETERS)
            if any_frame or frame.split(" ")[0] not in frames.SENTENCES:
                return frame
    if s.chance(0.55):
        return f"{s.fillers(0, 1)} {{p}}{s.fillers(0, 3, 0.15)} {{v}}".strip()
    return f"{s.fillers(0, 2)} {{v}}{s.fillers(1, 1)}{s.fillers(0, 2, 0.15)} {{p}}".strip()


def _result_value(s: Source) -> Any:
    kind = s.number(0, 4)
    if kind == 0:
        return s.number(0, 9999)
    if kind == 1:
        return s.number(1, 999) / 10
    if kind == 2:
        return f"{s.noun()} {s.noun()}"
    return s.name() if kind == 3 else s.noun()


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _make_tool(s: Source, similar: Tool | None) -> Tool:
    """A tool, which shares its verb or its object with `similar`."""
    verb, verbs = s.pick(VERBS)
    thing = s.noun()
    if s.chance(0.35):
        thing = f"{s.word(ADJECTIVES) if s.chance(0.5) else s.noun()} {thing}"
    if similar is not None and s.chance(0.5):
        verb, verbs = next(v for v in VERBS if v[0] == similar.verb)
    elif similar is not None:
        thing = similar.object
    words = {"verb": verb, "verbs": verbs, "object": thing}
    words |= {"Verb": _capital(verb), "Verbs": _capital(verbs)}
    description = _capital(_description_frame(s).format(**words).strip())
    opaque = s.chance(0.45)  # often, so that descriptions must be read
    name = _tool_name(s, s.pseudo_word() if opaque else "", verb, thing)
    if not opaque and s.chance(0.08):
        description = ""
    names = s.sample(lambda: _parameter_name(s), s.pick((0, 1, 1, 2, 2, 2, 3, 3, 4)))
    described = s.chance(0.4)
    properties = {n: _schema(s, n, thing, described) for n in names}
    required = tuple(n for n in names if s.chance(0.7))
    return Tool(name, description, verb, thing, properties, required, s.chance(0.15))


def _tool_name(s: Source, opaque: str, verb: str, thing: str) -> str:
    if opaque:
        return opaque if s.chance(0.6) else f"{opaque}_{s.number(1, 99)}"
    words = thing.split()
    kind = s.number(0, 5)
    if kind == 0:
        return verb + "".join(map(_capital, words))
    if kind == 1:
        return "_".join([*words, verb])
    return ("-" if kind == 2 else "_").join([verb, *words])


def _parameter_name(s: Source) -> str:
    kind = s.number(0, 9)
    if kind <= (5 if s.held_out else 4):  # training has more words that can only be copied
        return s.word(PARAMETERS)
    if kind <= 7:
        return s.pseudo_word()
    return f"{s.word(PARAMETERS)}_{s.word(PARAMETERS)}"


def _schema(s: Source, name: str, thing: str, described: bool, depth: int = 0) -> Json:
    kinds = ["string"] * 5 + ["integer"] * 3 + ["number", "boolean", "enum"]
    if depth == 0:
        kinds += ["boolean", "enum", "array", "object"]
    kind = s.pick(kinds)
    schema: Json = {"type": "string" if kind == "enum" else kind}
    if described and depth == 0:
        words = {"p": _spoken(name), "P": _capital(_spoken(name)), "object": thing}
        schema["description"] = s.pick(_DESCRIBE_PARAMETER).format(**words)
    if kind == "enum":
        schema["enum"] = s.sample(s.noun, s.number(2, 4))
    elif kind == "array":
        schema["items"] = {"type": s.pick(("string", "string", "integer"))}
    elif kind == "object":
        fields = s.sample(lambda: s.word(PARAMETERS), s.number(1, 3))
        schema["properties"] = {f: _schema(s, f, thing, False, depth + 1) for f in fields}
    return schema


def _value(s: Source, schema: Json) -> Any:
    if "enum" in schema:
        return s.pick(schema["enum"])
    kind = schema["type"]
    if kind == "integer":
        return (
            s.number(0, 9) if s.chance(0.3) else int(s.digits(1, 5)) * (-1 if s.chance(0.05) else 1)
        )
    if kind == "number":
        return s.number(1, 9999) / s.pick((10, 100))
    if kind == "boolean":
        return s.chance(0.5)
    if kind == "array":
        return s.sample(lambda: _value(s, schema["items"] | {"plain": True}), s.number(1, 4))
    if kind == "object":
        return {name: _value(s, field) for name, field in schema["properties"].items()}
    return s.noun() if "plain" in schema else _string(s)


def _string(s: Source) -> str:
    kind = s.number(0, 11)
    if kind <= 2:
        return s.name()
    if kind <= 4:
        return s.noun()
    if kind == 5:
        return f"{s.noun()} {s.noun()}"
    if kind == 6:
        return f"{s.name()} {s.name()}"
    if kind == 7:
        return f"{s.pick('ABCDEFGHKLMNPRSTVWXZ')}{s.pick('ABCDEFGHKLMNPRSTVWXZ')}-{s.digits(2, 4)}"
    if kind == 8:
        return s.digits(4, 6)  # such as a zip code: its type is string, so it stays one
    if kind == 9:
        return f"{s.pseudo_word()}@{s.pseudo_word()}.{s.pick(('com', 'org', 'net'))}"
    if kind == 10:
        return f"{s.number(2020, 2039)}-{s.number(1, 12):02}-{s.number(1, 28):02}"
    return f"/{s.noun()}/{s.pseudo_word()}.{s.pick(('txt', 'json', 'png'))}"


def _phrase(s: Source, name: str, value: Any, schema: Json, inside: bool) -> str:
    spoken = name if s.chance(0.3) else _spoken(name)
    if s.chance(0.35):
        spoken = s.pick(_DETERMINERS) + spoken
    if isinstance(value, bool):
        if s.chance(0.4 if s.frames_held_out else 0.55):
            return f"{'with' if value else 'without'} {spoken}"
        value = s.pick(_TRUE if value else _FALSE)
    elif isinstance(value, str):
        if " " in value or s.chance(0.25):
            value = s.pick(('"{}"', "'{}'")).format(value)
    elif isinstance(value, list):
        plain = [str(v) for v in value]
        value = s.pick((json.dumps(value), ", ".join(plain), _listed(plain), _listed(plain)))
    elif isinstance(value, dict):
        fields = [f"{_spoken(k)} {_plain(v)}" for k, v in value.items()]
        value = s.pick((json.dumps(value), f"({', '.join(fields)})", f"({_listed(fields)})"))
    return _parameter_frame(s, inside).format(p=spoken, v=value)


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def flagged(s: Source, tool: Tool) -> Tool:
    """The tool with one more parameter, a flag."""
    name = s.word(FLAGS)
    return replace(tool, properties={**tool.properties, name: {"type": "boolean"}})
