"""Whole dialogues of typed requests, and the mix that the demo model is trained on."""

from collections.abc import Callable, Sequence
from typing import Any

from ..dialogues import KINDS, Dialogue, dialogue
from ..questions import retrieval
from ..words import ADJECTIVES, NOUNS, VERBS, Source
from . import turns
from .agents import AGENT_TASKS, CODING_PROMPTS
from .grammar import expand
from .toolbox import TypedTool, intents, make_tools
from .turns import Turn

Json = dict[str, Any]
Maker = Callable[[Source, Sequence[TypedTool], bool], Turn]
_SYSTEM = (
    "[You are a helpful assistant.|You are a helpful assistant with [tools|access to functions].|Be "
    "brief.|Use the tools [if they help|when needed|you have].|You are [a friendly|a polite|the] "
    "[bot|assistant|helper|agent] of {n}.|Answer [shortly|in one sentence|the user].|You help with "
    "{n} and {n}.|Today is 20{i}.|Only call a tool if it fits. Otherwise answer directly.|You are "
    "{n}bot.|Never make up values for arguments.|You work for the {n} {n}.]"
)
_LONG_RULES = (
    "[- |- |* |{i}. ||][Always|Never|Do not|You must|You should|Please|When you {v} the {n},] {v} the "
    "{n} [before|after|unless|when|if] [you|the user|the {n}] {v}s the {a} {n}.|[## |# |### ]{n} "
    "{n}|[- ]`{n}_{n}`: [the {n} of|how to {v}] the {a} {n}.|[If|When] the {n} is {a}, [use|take|{v}]"
    " the {n} [and|or|not] the {a} {n}.|The {n} [has|needs|uses] {i} {n}s and [a|one|no] {a} {n}.|"
    "For example: {v} {n}/{n}.{n}|<{n}>{a} {n}</{n}>|{n}: {i}, {n}: {a}"
)
_FIELDS: dict[str, Sequence[str]] = {
    "n": NOUNS, "a": ADJECTIVES, "v": tuple(v for v, _ in VERBS), "i": tuple(map(str, range(10, 99))),
}  # fmt: skip
_TOOL_COUNTS = (0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 10, 14)
_MANY_TOOLS = 0.03  # of the dialogues have up to all tools
_TOKENS_PER_WORD_OF_FACTS = 2.9  # with the tokenizer of this mix; invented words need many
_TOKENS_PER_WORD_OF_PROMPTS = 2.2
_SHORTEST_LONG, _LONGEST_LONG = 5_000, 61_000  # tokens of a long dialogue, about


def typed_dialogue(
    seed: int | str,
    held_out: bool = False,
    kind: str | None = None,
    frames_held_out: bool | None = None,
) -> Dialogue:
    """The dialogue of this seed, of kind `kind` (a key of TYPED_KINDS, None: a random one)."""
    s = Source(f"typed-{seed}", held_out, frames_held_out)
    kind = kind or s.rng.choices(tuple(TYPED_KINDS), [w for _, w in TYPED_KINDS.values()])[0]
    return TYPED_KINDS[kind][0](s)


def training_dialogue(seed: str) -> Dialogue:
    """A training dialogue of at most a few thousand tokens."""
    s = Source(f"mix-{seed}")
    kinds = {kind: weight * _OLD_SHARE for kind, (_, weight) in KINDS.items()}
    kinds |= {kind: weight for kind, (_, weight) in TYPED_KINDS.items()}
    kind = s.rng.choices(tuple(kinds), list(kinds.values()))[0]
    return dialogue(seed, kind=kind) if kind in KINDS else typed_dialogue(seed, kind=kind)


def long_dialogue(seed: str, held_out: bool = False) -> Dialogue:
    """A dialogue of 5,000 to 61,000 tokens, about: a fact in a long text, or any turn after the
    long system prompt of an agent. Lengths are spread evenly by their logarithm."""
    s = Source(f"long-{seed}", held_out)
    tokens = _SHORTEST_LONG * (_LONGEST_LONG / _SHORTEST_LONG) ** s.rng.random()
    if s.chance(0.5):
        words = int(tokens / _TOKENS_PER_WORD_OF_FACTS)
        turn = retrieval(s, words, s.pick((0.1, 0.2, 1.0)))
        messages = [{"role": "system", "content": turn.system}] if turn.system else []
        messages += [turns.user(turn.user), turns.assistant(turn.thought, turn.answer)]
        return Dialogue("long", messages, [], s.chance(0.5), (turn.answer,))
    maker = s.pick((turns.call, turns.calls, turns.result, turns.agent, turns.talk, turns.limits))
    return _with_tools(s, "long", maker, long_prompt(s, int(tokens / _TOKENS_PER_WORD_OF_PROMPTS)))


def long_prompt(s: Source, words: int) -> str:
    """A system prompt of about `words` words: rules, headings and examples."""
    lines: list[str] = [expand(s.rng, CODING_PROMPTS)]
    count = 0
    while count < words:
        line = _quickly_filled(s, _LONG_RULES)
        count += len(line.split())
        lines.append(line)
    return "\n".join(lines)


def _quickly_filled(s: Source, rule: str) -> str:
    parts = expand(s.rng, f"[{rule}]").split("{")
    filled = [parts[0]]
    for part in parts[1:]:
        field, _, rest = part.partition("}")
        words = _FIELDS[field]
        filled.append(words[int(s.rng.random() * len(words))] + rest)
    return "".join(filled)


def _with_tools(s: Source, kind: str, last: Maker, system: str = "") -> Dialogue:
    """The `last` turn, perhaps after others with the same tools."""
    wanted = []
    if last is turns.agent:
        names = s.pick(AGENT_TASKS).needs
        wanted = [intent for intent in intents() if intent.name in names]
        system = system or (expand(s.rng, CODING_PROMPTS) if s.chance(0.5) else "")
    count = s.pick(_TOOL_COUNTS) if not s.chance(_MANY_TOOLS) else s.number(15, len(intents()))
    tools = make_tools(s, wanted, max(count, 1 - len(wanted)))
    others: tuple[Maker, ...] = (
        turns.call, turns.calls, turns.none_fits, turns.talk, turns.result, turns.agent,
        turns.result, turns.limits, turns.sums, turns.none_fits,
    )  # fmt: skip
    before = s.pick((0, 0, 0, 1, 1, 2, 3, 5))
    makers = [s.pick(others) for _ in range(before)]
    # A call that gets no result cannot be followed by a user's message.
    makers = [turns.result if maker in (turns.call, turns.calls) else maker for maker in makers]
    return _dialogue(s, kind, tools, [*makers, last], system)


def _without_tools(s: Source, kind: str, last: Maker) -> Dialogue:
    """The `last` turn after up to four others. In a third of the dialogues there are tools, which do
    not matter."""
    if s.chance(0.33):
        return _with_tools(s, kind, last)
    others = (turns.talk, turns.sums, turns.limits, turns.texts)
    makers = [s.pick(others) for _ in range(s.pick((0, 0, 1, 2, 4)))]
    return _dialogue(s, kind, [], [*makers, last], "")


def _dialogue(
    s: Source, kind: str, tools: list[TypedTool], makers: Sequence[Maker], system: str
) -> Dialogue:
    thinking, keeps = s.chance(0.55), s.chance(0.4)
    messages: list[Json] = []
    if system or s.chance(0.3):
        text = system or _quickly_filled(s, _SYSTEM)
        messages.append({"role": "system", "content": text})
    for maker in makers[:-1]:
        messages += maker(s, tools, thinking and keeps).messages
    turn = makers[-1](s, tools, thinking)
    declarations = [tool.declaration for tool in tools]
    everything = messages + turn.messages
    return Dialogue(kind, everything, declarations, thinking, turn.must_say, keeps)


_OLD_SHARE = 0.55
# kind -> (maker, how often)
TYPED_KINDS: dict[str, tuple[Callable[[Source], Dialogue], float]] = {
    "typed call": (lambda s: _with_tools(s, "typed call", turns.call), 5.0),
    "typed calls": (lambda s: _with_tools(s, "typed calls", turns.calls), 2.5),
    "typed no call": (lambda s: _with_tools(s, "typed no call", turns.none_fits), 2.0),
    "typed result": (lambda s: _with_tools(s, "typed result", turns.result), 1.5),
    "agent": (lambda s: _with_tools(s, "agent", turns.agent), 2.5),
    "sums": (lambda s: _without_tools(s, "sums", turns.sums), 4.0),
    "talk": (lambda s: _without_tools(s, "talk", turns.talk), 2.0),
    "limits": (lambda s: _without_tools(s, "limits", turns.limits), 2.0),
    "texts": (lambda s: _without_tools(s, "texts", turns.texts), 2.5),
}
