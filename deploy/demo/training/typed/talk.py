"""Small talk, facts that the model must know by heart, and requests that it cannot serve."""

import functools
from pathlib import Path

from ..questions import CAPITALS, OPPOSITES
from ..words import Source
from .grammar import expand, frame_checksum, request_frame, reserved
from .style import careless, typed
from .toolbox import intents, make_tool, request
from .values import filled

LIMITS = (
    "Sorry, I am only a small demo model: I can chat a little, do sums, call tools and work with "
    "short lists, but not this."
)
LIMITS_THOUGHT = "This is more than I can do. I say so."
_UNABLE_WITHOUT_TOOLS = ("math/calc",)  # the model does these itself
_CAPITAL_ASKS = (
    "[what is|what's|whats|name|tell me|do you know|say|give me] the capital [|city ]of {x}",
    "[which|what] [city|town|place] is [the capital|capital] of {x}",
    "[the |]capital [|city ]of {x}",
    "{x}['s capital|s capital| capital| capital city|, capital]",
    "[I need|I want to know|I am looking for|remind me of|find] the capital of {x}",
    "what is {x}'s capital [called|city]",
    "in {x}, [which|what] city is the capital",
)
_OPPOSITE_ASKS = (
    "[what is|what's|whats|name|tell me|say|give me|do you know] the opposite of {x}",
    "[the |]opposite of {x}",
    "[what|which word] is the opposite [to|of] {x}",
    "[antonym|the antonym] of {x}",
    "{x} is the opposite of [what|which word]",
    "[a word|one word] that means the opposite of {x}",
)


@functools.cache
def _talk() -> tuple[tuple[tuple[str, ...], str], ...]:
    """(rules, answer) of `talk.txt`."""
    found: list[tuple[tuple[str, ...], str]] = []
    asks: list[str] = []
    for line in Path(__file__).with_name("talk.txt").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if key == "ask":
            asks.append(rest)
        elif key == "=":
            found.append((tuple(asks), rest))
            asks = []
    return tuple(found)


@functools.cache
def limit_rules(with_tools: bool = False) -> tuple[str, ...]:
    """The rules of `limits.txt`; for a model `with_tools` those that no tool could serve."""
    lines = Path(__file__).with_name("limits.txt").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    return tuple(rule.removeprefix("! ") for rule in rules if not (with_tools and rule[0] == "!"))


def talk_turn(s: Source) -> tuple[str, str, str]:
    """(request, thought, answer) of small talk or a known fact."""
    kind = s.number(0, 9)
    asks: tuple[str, ...]
    if kind <= 2:
        country = s.pick(tuple(CAPITALS))
        asks, word = _CAPITAL_ASKS, country.replace("-", " ")
        answer = f"The capital of {word} is {CAPITALS[country].replace('-', ' ')}."
    elif kind == 3:
        word = s.pick(tuple(OPPOSITES))
        asks, answer = _OPPOSITE_ASKS, f"The opposite of {word} is {OPPOSITES[word]}."
        word = s.pick(("{}", "{}", "'{}'", '"{}"')).format(word)
    else:
        asks, answer = s.pick(_talk())
        word = s.name()
    frame = _asked(s, asks)
    frame = frame.replace("{x}", word.lower() if frame == frame.lower() else word)
    return frame.replace("{name}", word), "I answer briefly.", answer


def _asked(s: Source, asks: tuple[str, ...]) -> str:
    """A frame with a question mark or none. Rules of small talk have none themselves."""
    frame = request_frame(s, asks)
    first = frame.split(" ")[0]
    if first in ("what", "which", "who", "how", "at", "where", "when", "are", "is", "do", "am"):
        frame += "?"
    return typed(s, frame) if s.chance(0.3) else careless(s, frame)


def limit_turn(s: Source) -> tuple[str, str, str]:
    """(request, thought, answer) of a request that the model cannot serve: it says so."""
    if s.chance(0.2):
        intent = s.pick([i for i in intents() if i.name not in _UNABLE_WITHOUT_TOOLS])
        text, _ = request(s, make_tool(s, intent))
        return text, LIMITS_THOUGHT, LIMITS
    return unable(s), LIMITS_THOUGHT, LIMITS


def unable(s: Source, with_tools: bool = False) -> str:
    """A request for something that neither the model nor, `with_tools`, a tool can do."""
    rules = limit_rules(with_tools)
    cut = len(rules) - len(rules) // 5
    while True:
        rule = s.pick(rules[cut:] if s.frames_held_out else rules[:cut])
        text = filled(s, expand(s.rng, rule))
        if frame_checksum(text) not in reserved():
            break
    text = " ".join(text.split())
    first = text.split(" ")[0].casefold()
    if first in ("what", "which", "who", "how", "where", "when", "why", "should", "is", "are"):
        text += "?"
    text = text.replace("{", "(").replace("}", ")")
    return typed(s, text) if s.chance(0.6) else careless(s, text)
