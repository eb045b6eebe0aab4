"""Turns of dialogues: a request, perhaps calls and results, and an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..words import Source
from .agents import AGENT_TASKS
from .results import error, file_text, make_result
from .sums import sum_turn
from .talk import limit_turn, talk_turn, unable
from .texts import text_turn
from .toolbox import TypedCall, TypedTool, make_tool, missing_intent, request, request_several

Json = dict[str, Any]
_FIND_ANYTHING = {"web", "news", "words", "url", "image"}  # families of tools
NO_TOOL = "Sorry, none of my tools can do that."
_JOINERS = (
    " and ", " and also ", ", and ", ". Also ", ". And ", ", then ", ". Then ", "; ", "\n", ". ",
    " plus ", ", also ", " & ", ". After that ", "? And ", " as well as ",
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """The messages of one turn, which begin with the user's and end with the assistant's, and the
    texts that the last one must contain."""

    messages: list[Json]
    must_say: tuple[str, ...] = ()


def user(text: str) -> Json:
    """A user's message."""
    return {"role": "user", "content": text}


def assistant(thought: str, content: str, calls: Sequence[TypedCall] = ()) -> Json:
    """An assistant's message. It has a thought even where thinking is off: it is left out later."""
    message: Json = {"role": "assistant", "reasoning_content": thought, "content": content}
    if calls:
        message["tool_calls"] = [call.message_part() for call in calls]
    return message


def results_of(texts: Sequence[str]) -> list[Json]:
    """Tool messages, in the order of the calls."""
    return [
        {"role": "tool", "tool_call_id": f"call_{n}", "content": text}
        for n, text in enumerate(texts)
    ]


def _simple(maker: Callable[[Source], tuple[str, str, str]]) -> Callable[..., Turn]:
    def turn(s: Source, tools: Sequence[TypedTool], thinks: bool) -> Turn:
        text, thought, answer = maker(s)
        if tools:
            thought = f"No tool is needed. {thought}"
        return Turn([user(text), assistant(thought, answer)])

    return turn


talk = _simple(talk_turn)
texts = _simple(text_turn)


def sums(s: Source, tools: Sequence[TypedTool], thinks: bool) -> Turn:
    """A calculation. There is none if a tool could do it: other turns call that one."""
    if any(tool.intent.name == "math/calc" for tool in tools):
        return talk(s, tools, thinks)
    text, thought, answer = sum_turn(s, thinks)
    return Turn([user(text), assistant(thought, answer)])


def limits(s: Source, tools: Sequence[TypedTool], thinks: bool) -> Turn:
    """A request that the model cannot serve. If it has tools, none of them could do it either."""
    text, thought, answer = limit_turn(s)
    if tools:
        if any(tool.intent.family in _FIND_ANYTHING for tool in tools):
            return talk(s, tools, thinks)
        text = unable(s, with_tools=True)
    return Turn([user(text), assistant(thought, answer)])


def _thought(calls: Sequence[TypedCall]) -> str:
    return f"I call {', '.join(call.tool.name for call in calls)}."


def call(s: Source, tools: Sequence[TypedTool], thinks: bool) -> Turn:
    """One call."""
    text, one = request(s, s.pick(tools))
    return Turn([user(text), assistant(_thought([one]), "", [one])])


def calls(s: Source, tools: Sequence[TypedTool], thinks: bool) -> Turn:
    """Two or three calls at once, of one tool or of several."""
    if s.chance(0.55):
        several = request_several(s, s.pick(tools), s.pick((2, 2, 2, 3)))
        if several is not None:
            text, made = several
            return Turn([user(text), assistant(_thought(made), "", made)])
    parts = [request(s, s.pick(tools)) for _ in range(s.pick((2, 2, 2, 3)))]
    joined = parts[0][0]
    for text, _ in parts[1:]:
        joiner = s.pick(_JOINERS)
        if joiner[0] in ".?;" or joiner.startswith("\n"):
            joined = joined.rstrip("?.! ")
        joined += joiner + text
    made = [one for _, one in parts]
    return Turn([user(joined), assistant(_thought(made), "", made)])


def none_fits(s: Source, tools: Sequence[TypedTool], thinks: bool) -> Turn:
    """A task for which there is no tool."""
    missing = missing_intent(s, tools)
    if missing is None:
        return talk(s, tools, thinks)
    text, _ = request(s, make_tool(s, missing))
    return Turn([user(text), assistant("None of my tools can do this.", NO_TOOL)])


def result(s: Source, tools: Sequence[TypedTool], thinks: bool) -> Turn:
    """Calls, their results, and an answer that says them. Some calls fail."""
    asked = calls(s, tools, thinks) if s.chance(0.25) else call(s, tools, thinks)
    names = [part["function"]["name"] for part in asked.messages[-1]["tool_calls"]]
    intents = {tool.name: tool.intent.name for tool in tools}
    makers = [file_text if intents[name] == "files/read" else make_result for name in names]
    made = [error(s) if s.chance(0.1) else maker(s) for maker in makers]
    said = assistant("The tool has answered.", " ".join(answer for _, answer, _ in made))
    must_say = tuple(value for _, _, values in made for value in values)
    messages = [*asked.messages, *results_of([text for text, _, _ in made]), said]
    return Turn(messages, must_say)


def agent(s: Source, tools: Sequence[TypedTool], thinks: bool) -> Turn:
    """A task of several steps, in each of which the model learns what it needs for the next."""
    by_intent = {tool.intent.name: tool for tool in tools}
    able = [task for task in AGENT_TASKS if set(task.needs) <= set(by_intent)]
    if not able:
        return result(s, tools, thinks)
    made = s.pick(able).make(s)
    messages = [user(made.text)]
    for step in made.steps:
        tool = by_intent[step.intent]
        slots = {tool.parameters[slot]: value for slot, value in step.values.items()}
        one = TypedCall(
            tool, {name: slots[name] for name in tool.parameters.values() if name in slots}
        )
        messages += [assistant(_thought([one]), "", [one]), *results_of([step.result])]
    return Turn([*messages, assistant("All is done.", made.answer)], made.must_say)
