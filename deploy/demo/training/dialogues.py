"""Seeded dialogues in the form of chat requests. The demo model is trained and judged on them.

`dialogue(seed)` is for training. With `held_out=True` its names, values and sentence frames do not
occur in any training dialogue.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .frames import JOINERS
from .questions import QUESTIONS, Turn
from .tools import (
    Call,
    Tool,
    ask_for,
    flagged,
    intent_without_tool,
    make_call,
    make_tools,
    recased,
    tool_result,
)
from .words import RESULT_KEYS, Source

Json = dict[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """The messages of a chat request and its replies. The last one is the assistant's.

    `must_say` are texts that the last answer must contain: values from tool results, or the fact
    that was asked for. `keeps_thoughts`: earlier turns keep their reasoning, as with
    `clear_thinking` false.
    """

    kind: str
    messages: list[Json]
    tools: list[Json]
    thinking: bool
    must_say: tuple[str, ...] = ()
    keeps_thoughts: bool = False

    @property
    def first_reply(self) -> int:
        """Index of the assistant's first message after the last user message."""
        users = [n for n, message in enumerate(self.messages) if message["role"] == "user"]
        return users[-1] + 1


def dialogue(
    seed: int | str,
    held_out: bool = False,
    kind: str | None = None,
    frames_held_out: bool | None = None,
) -> Dialogue:
    """The dialogue of this seed, of kind `kind` (a key of KINDS, None: a random one)."""
    s = Source(seed, held_out, frames_held_out)
    kind = kind or s.rng.choices(tuple(KINDS), [weight for _, weight in KINDS.values()])[0]
    messages, tools, must_say = KINDS[kind][0](s)
    keeps = s.chance(0.5) and not s.frames_held_out
    item = Dialogue(kind, messages, tools, s.chance(0.7), tuple(must_say), keeps)
    _say_calculations(item)
    return item


def _say_calculations(item: Dialogue) -> None:
    """Put calculations before the answers, where the thought that has them is not shown."""
    for number, message in enumerate(item.messages):
        calculation = message.pop("calculation", "")
        is_shown = item.thinking and (item.keeps_thoughts or number >= item.first_reply)
        if calculation and not is_shown:
            message["content"] = f"{calculation} {message['content']}"


Parts = tuple[list[Json], list[Json], list[str]]  # messages, tools, must_say
Turns = tuple[list[Json], list[str]]  # messages, must_say


def _user(text: str) -> Json:
    return {"role": "user", "content": text}


def _answer(thought: str, content: str, calls: list[Call] | None = None) -> Json:
    message: Json = {"role": "assistant", "reasoning_content": thought, "content": content}
    if calls:
        message["tool_calls"] = [call.message_part() for call in calls]
    return message


def _answer_to(turn: Turn, thought: str = "") -> Json:
    """The answer to a question, after a first `thought`."""
    message = _answer(f"{thought} {turn.thought}".strip(), turn.answer)
    return message | {"calculation": turn.calculation}


def _question(s: Source) -> Turn:
    makers, weights = zip(*QUESTIONS, strict=True)
    maker: Callable[[Source], Turn] = s.rng.choices(makers, weights)[0]
    return maker(s)


def _chat(s: Source) -> Parts:
    """One to four questions. Only the first may come with a system prompt."""
    turns = [_question(s)]
    while s.chance(0.5) and len(turns) < 4 and len(turns[0].user + turns[0].system) < 1500:
        turn = _question(s)
        if not turn.system:
            turns.append(turn)
    messages: list[Json] = []
    if turns[0].system:
        messages.append({"role": "system", "content": turns[0].system})
    elif s.chance(0.15):
        messages.append({"role": "system", "content": "You are a helpful assistant."})
    for turn in turns:
        messages += [_user(turn.user), _answer_to(turn)]
    return messages, [], []


def _thought(calls: list[Call]) -> str:
    plans = [f"{call.tool.verb} the {call.tool.object}: {call.tool.name}" for call in calls]
    return f"I need to {', then '.join(plans)}."


def _lower_first(text: str) -> str:
    return text if text.startswith(("I ", "I'd ")) else text[:1].lower() + text[1:]


def _request(s: Source, tools: list[Tool], count: int) -> tuple[str, list[Call]]:
    """A user's text that asks for `count` calls, and the calls."""
    calls: list[Call] = []
    same = s.chance(0.4)
    for _ in range(count):
        tool = calls[0].tool if calls and same else s.pick(tools)
        call = make_call(s, tool)
        if call not in calls:
            calls.append(call)
    # Either all arguments come first or none: otherwise one could belong to either of two calls.
    first = s.chance(0.15)
    texts = [ask_for(s, call, first) for call in calls]
    joined = texts[0]
    for text, call in zip(texts[1:], calls[1:], strict=True):
        joiner = s.pick(JOINERS)
        if joiner.endswith(" ") and len(joiner) > 3:
            text = recased(text, call, _lower_first)
        joined = (joined if joined[-1] in ".?" else joined + ".") + joiner + text
    return joined, calls


def _call(s: Source, tools: list[Tool], count: int) -> Turns:
    """`count` calls of one tool or of several."""
    text, calls = _request(s, tools, count)
    return [_user(text), _answer(_thought(calls), "", calls)], []


def _no_call(s: Source, tools: list[Tool]) -> Turns:
    """No tool fits, or the question needs none."""
    if s.chance(0.4):
        turn = _question(s)
        if not turn.system and len(turn.user) < 1000:
            return [_user(turn.user), _answer_to(turn, "No tool is needed.")], []
    missing = intent_without_tool(s, tools)
    task = f"{missing.verb} the {missing.object}"
    answer = _answer(f"I need to {task}: no tool.", f"I have no tool to {task}.")
    return [_user(ask_for(s, make_call(s, missing))), answer], []


def _result(s: Source, tools: list[Tool], count: int) -> Turns:
    """Calls, their results, and an answer that says the results."""
    messages, _ = _call(s, tools, count)
    said, must_say = [], []
    for number, _ in enumerate(messages[-1]["tool_calls"]):
        content, sentence, values = tool_result(s, RESULT_KEYS)
        messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": content})
        said.append(sentence)
        must_say += values
    return [*messages, _answer("The tool has answered.", " ".join(said))], must_say


def _with_tools(s: Source, last: Callable[[Source, list[Tool]], Turns]) -> Parts:
    """The `last` turn after several others with the same tools, so that one prompt teaches more."""
    flags = 0.12 if s.frames_held_out else 0.25
    tools = [flagged(s, t) if s.chance(flags) else t for t in make_tools(s, s.number(1, 5))]
    messages: list[Json] = []
    if s.chance(0.3):
        text = s.pick(("You are a helpful assistant.", "Use the tools.", "Be brief.",
                       f"You work for {s.name()}.",
                       "Today is day " + s.digits(1, 2) + "."))  # fmt: skip
        messages.append({"role": "system", "content": text})
    for _ in range(s.pick((0, 0, 1, 2, 3) if s.frames_held_out else (0, 0, 1, 2, 3, 4, 6, 8))):
        kind = s.number(0, 9)
        turns, _ = _no_call(s, tools) if kind < 3 else _result(s, tools, 2 if kind < 7 else 1)
        messages += turns
    turns, must_say = last(s, tools)
    return messages + turns, [tool.declaration() for tool in tools], must_say


def _several(s: Source) -> int:
    return 3 if s.chance(0.15) else 2


# kind -> (maker, how often)
KINDS: dict[str, tuple[Callable[[Source], Parts], float]] = {
    "chat": (_chat, 1.9),
    "call": (lambda s: _with_tools(s, lambda s, tools: _call(s, tools, 1)), 2.3),
    "parallel": (lambda s: _with_tools(s, lambda s, tools: _call(s, tools, _several(s))), 3.6),
    "no_call": (lambda s: _with_tools(s, _no_call), 2.4),
    "result": (lambda s: _with_tools(s, lambda s, t: _result(s, t, s.pick((1, 1, 2)))), 1.0),
}
