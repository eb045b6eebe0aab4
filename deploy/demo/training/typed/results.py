"""Makes results of tools, and the answers that say them."""

import json
from typing import Any

from ..words import NOUNS, RESULT_KEYS, Source
from .values import MAKERS, as_text, filled

_DONE = (
    "ok|done|success|sent|created|saved|OK|finished|written|true|updated|accepted|started".split(
        "|"
    )
)
_ERRORS = (
    "[no such file|file not found|not found|permission denied|timeout|access denied|invalid {n}|"
    "the {n} does not answer|{n} not found|connection refused|no {n} with this name|rate limit "
    "reached|wrong {n}|{n} is locked|the {n} is offline|unknown {n}|internal error]"
)
_PLAIN = (
    "{i} [degrees|euros|users|files|points|km|items|minutes][| and {a}|, {a}| left]|{a} {n}|{n}: {i}|"
    "{i} {n}s found|[passed|failed]: {i}|the {n} is {a}|{name} [has|owns] the {n}|{i} passed in {i}s|"
    "* {n}/{n}|{n} {n} at {i}|{i}|{name}"
)
Result = tuple[str, str, list[str]]  # the tool's text, the answer, values the answer must contain


def make_result(s: Source) -> Result:
    """A result of some tool."""
    kind = s.number(0, 11)
    if kind == 0:
        return error(s)
    if kind <= 2:
        text = s.pick(_DONE)
        form = s.pick(("{}", "{}", '{{"status": "{}"}}', '{{"result": "{}"}}')).format(text)
        return form, f"Done: {text}.", [text]
    if kind <= 4:
        text = filled(s, _PLAIN)
        return text, f"The result is {text}.", [text]
    if kind == 5:
        return _list(s)
    if kind == 6:
        return json.dumps({s.word(RESULT_KEYS) + "s": []}), "There is no result.", ["no result"]
    return _fields(s)


def error(s: Source) -> Result:
    """A failure, in one of its usual forms."""
    text = filled(s, _ERRORS)
    form = s.pick(("Error: {}", "error: {}", '{{"error": "{}"}}', '{{"error": {{"message": "{}"}}}}',
                   "failed: {}", '{{"success": false, "message": "{}"}}'))  # fmt: skip
    return form.format(text), f"The tool failed: {text}.", [text]


def file_text(s: Source) -> Result:
    """A file's text of one to six lines."""
    lines = [_line(s) for _ in range(s.pick((1, 1, 2, 3, 4, 6)))]
    text = "\n".join(lines)
    return text, f"It says:\n{text}" if len(lines) > 1 else f"It says: {text}", lines


def _line(s: Source) -> str:
    kind = s.number(0, 5)
    if kind == 0:
        return f"{s.noun()} = {s.digits(1, 4)}"
    if kind == 1:
        return f"{s.noun()}: {s.noun()}"
    if kind == 2:
        return f"import {s.noun()}"
    if kind == 3:
        return f"{s.noun()},{s.noun()},{s.digits(1, 3)}"
    return str(MAKERS["sentence"].make(s).value) if kind == 4 else s.digits(1, 5)


def _value(s: Source) -> Any:
    kind = s.number(0, 5)
    if kind == 0:
        return s.number(0, 9999)
    if kind == 1:
        return s.number(1, 9999) / s.pick((10, 100))
    if kind == 2:
        return s.pick((MAKERS["date"], MAKERS["clock"], MAKERS["code"])).make(s).value
    if kind == 3:
        return f"{s.pick(NOUNS)} {s.noun()}"
    return s.name() if kind == 4 else s.noun()


def _fields(s: Source) -> Result:
    """An object. The answer says all its fields."""
    names = s.sample(lambda: s.word(RESULT_KEYS), s.pick((1, 1, 2, 2, 3, 4)))
    value = {name: _value(s) for name in names}
    said = [f"the {name} is {as_text(v)}" for name, v in value.items()]
    text = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    shown: Any = {s.pick(("data", "result", "response")): value} if s.chance(0.1) else value
    return (
        json.dumps(shown, indent=2 if s.chance(0.15) else None, ensure_ascii=False),
        f"{text[:1].upper()}{text[1:]}.",
        [as_text(v) for v in value.values()],
    )


def _list(s: Source) -> Result:
    """Names, or objects with two fields each."""
    if s.chance(0.5):
        names = s.sample(s.noun, s.number(2, 5))
        shown = json.dumps(names) if s.chance(0.5) else "\n".join(names)
        return shown, f"There are {len(names)}: {', '.join(names)}.", names
    first, second = s.sample(lambda: s.word(RESULT_KEYS), 2)
    rows = [{first: _value(s), second: _value(s)} for _ in range(s.number(1, 3))]
    said = [f"{first} {as_text(row[first])}, {second} {as_text(row[second])}" for row in rows]
    values = [as_text(value) for row in rows for value in row.values()]
    return json.dumps(rows, ensure_ascii=False), f"{'; '.join(said)}.", values
