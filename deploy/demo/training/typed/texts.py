"""Short lists and texts: sort, count, compare, pick, repeat, change, JSON, days and months."""

import json
from collections.abc import Callable

from ..words import NOUNS, Source
from .grammar import request_frame
from .style import careless, typed
from .values import MAKERS

_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = (
    "January February March April May June July August September October November December"
).split()
_ORDINALS = "first second third fourth fifth".split()
_PUT = "[put|give me|write|show me|list|bring|arrange|order]"
Turn = tuple[str, str, str]  # request, thought, answer


def text_turn(s: Source) -> Turn:
    """(request, thought, answer) of one task."""
    makers, weights = zip(*_TASKS, strict=True)
    maker: Callable[[Source], Turn] = s.rng.choices(makers, weights)[0]
    return maker(s)


def _ask(s: Source, asks: tuple[str, ...], **words: str) -> str:
    frame = request_frame(s, asks)
    frame = typed(s, frame) if s.chance(0.5) else careless(s, frame)
    for field, word in words.items():
        frame = frame.replace(f"{{{field}}}", word)
    return frame


def _listed(s: Source, items: list[str]) -> str:
    kind = s.number(0, 4)
    if kind == 0:
        return " ".join(items)
    if kind == 1 and len(items) > 1:
        return f"{', '.join(items[:-1])} and {items[-1]}"
    return ", ".join(items)


def _words(s: Source, low: int, high: int) -> list[str]:
    real = s.chance(0.6)
    return s.sample(lambda: s.word(NOUNS) if real else s.noun(), s.number(low, high))


def _sort(s: Source) -> Turn:
    down = s.chance(0.35)
    if s.chance(0.6):
        top = s.pick((9, 20, 99, 999))
        numbers = s.sample(lambda: s.number(0, top), s.number(3, 6 if top < 20 else 7))
        ordered = [str(n) for n in sorted(numbers, reverse=down)]
        items, up = (
            [str(n) for n in numbers],
            "[|in ascending order|from small to large|from low to ",
        )
        up += "high|increasing|smallest first|from smallest to biggest|by size|lowest first]"
        fall = "[in descending order|from large to small|from high to low|decreasing|largest first|"
        fall += "biggest first|in reverse order|from biggest to smallest|highest first]"
        kind = "[these numbers|the numbers|the list|these|this list|numbers|the following|]"
    else:
        items = _words(s, 3, 5)
        ordered = sorted(items, reverse=down)
        up = "[alphabetically|by alphabet|from a to z|in abc order|by name|in alphabetic order|by "
        up += "first letter]"
        fall = "[in reverse alphabetical order|from z to a|alphabetically backwards]"
        kind = "[these words|the words|the list|these|this list|words|the following words|]"
    order = fall if down else up
    asks: tuple[str, ...] = (
        f"[sort|order|can you sort|please sort|arrange] {kind} {order}[:|] {{x}}",
        f"[sort|order] {{x}} {order}",
        f"{{x}} - [sort|order|please sort] [them|this|these|it] {order}",
        f"{_PUT} {{x}} {order if down else order.replace('[|', '[')} [please|]",
        f"[I have|here is|here are] {{x}}. [sort them|sort it|order them|put them in order] {order}",
    )
    if not down and "small" not in up:
        asks += (f"[put|bring|get] {kind} into order {order}: {{x}}",)
    return _ask(s, asks, x=_listed(s, items)), "I sort the list.", f"{', '.join(ordered)}."


def _extreme(s: Source) -> Turn:
    top = s.pick((20, 99, 999))
    numbers = s.sample(lambda: s.number(0, top), s.number(2, 6))
    low = s.chance(0.5)
    word = "[smallest|lowest|least|minimum|min]" if low else "[largest|biggest|highest|maximum|max]"
    asks: tuple[str, ...] = (
        f"[what is|what's|which is|whats|find|give me|tell me] the {word} [|number] [of|in|among|from] {{x}}",
        f"{{x}}: [which is|what is|find|tell me] the {word} [|number|one]",
        f"the {word} [number|value|one] [of|in] {{x}}",
        f"[which|what] [number|one] is the {word}[,|:] {{x}}",
        f"{word} of {{x}}",
    )
    result = min(numbers) if low else max(numbers)
    answer = f"{result} is the {'smallest' if low else 'largest'}."
    return _ask(s, asks, x=_listed(s, [str(n) for n in numbers])), "I compare the numbers.", answer


def _compare(s: Source) -> Turn:
    top = s.pick((20, 99, 999, 9999))
    a, b = s.sample(lambda: s.number(0, top), 2)
    if s.chance(0.5):
        more = s.chance(0.6)
        word = "[larger|bigger|greater|more|higher]" if more else "[smaller|less|lower]"
        asks: tuple[str, ...] = (
            f"[what|which] is {word}[,|:|] {{a}} or {{b}}",
            f"{{a}} or {{b}}[, which is| - what is|, what's|: which one is] {word}",
            f"[which one|which number|which of them] is {word}[,|:] {{a}} or {{b}}",
            f"[compare {{a}} and {{b}}: which is|of {{a}} and {{b}}, which is] {word}",
            f"[tell me|say] the {word.replace('more|', '')} of {{a}} and {{b}}",
        )
        text = f"{max(a, b) if more else min(a, b)} is {'larger' if more else 'smaller'}."
        return _ask(s, asks, a=str(a), b=str(b)), f"I compare {a} and {b}.", text
    more = s.chance(0.6)
    word = "[larger|bigger|greater|more|higher]" if more else "[smaller|less|lower]"
    asks = (
        f"is {{a}} {word} than {{b}}?",
        f"{{a}} is {word} than {{b}}[, right|, true or false|, correct|, yes or no]?",
        f"[tell me|do you know] [if|whether] {{a}} is {word} than {{b}}",
        f"would you say {{a}} is {word} than {{b}}?",
    )
    right = (a > b) == more
    sign = "larger" if a > b else "smaller"
    answer = f"{'Yes' if right else 'No'}, {a} is {sign} than {b}."
    return _ask(s, asks, a=str(a), b=str(b)), f"I compare {a} and {b}.", answer


def _count(s: Source) -> Turn:
    if s.chance(0.3):
        word = s.word(NOUNS) if s.chance(0.7) else s.noun()
        asks: tuple[str, ...] = (
            "how many [letters|characters] [has|does|are in|are there in] [the word |]{x}",
            "[count|number of|tell me] the letters [in|of] {x}",
            "{x}: how many letters",
            "how long is the word {x}",
        )
        letters = ", ".join(f"{letter} {n}" for n, letter in enumerate(word, 1))
        quoted = s.pick(("{}", "{}", "'{}'", '"{}"')).format(word)
        return _ask(s, asks, x=quoted), f"I count: {letters}.", f"{word} has {len(word)} letters."
    items = _words(s, 2, 9)
    if s.chance(0.4):
        text, thing = " ".join(items), "words"
        asks = (
            "[count|number of] the words [in|of][:|] {x}",
            "how many words [are|are there] in[:|] {x}",
            "{x} - [how many words|count the words]",
            "how many words has [this|the text|the sentence][:|] {x}",
        )
        text = s.pick(("{}", "'{}'", '"{}"')).format(text)
    else:
        text, thing = _listed(s, items), "items"
        asks = (
            "[count|number of] the [items|things|entries|elements] [in|of] [this list|the list|][:|] {x}",
            "how many [items|things|entries|elements] [are|are there] [here|in the list|in this list|in][:|] {x}",
            "{x}: [how many|how many items|how many are there|count them]",
            "how long is [this|the] list: {x}",
        )
    counted = ", ".join(f"{item} {n}" for n, item in enumerate(items, 1))
    return _ask(s, asks, x=text), f"I count: {counted}.", f"There are {len(items)} {thing}."


def _count_up(s: Source) -> Turn:
    low, length = s.number(0, 30), s.number(2, 11)
    down = s.chance(0.25)
    numbers = [str(n) for n in range(low, low + length)]
    numbers = numbers[::-1] if down else numbers
    asks: tuple[str, ...] = (
        "[count|can you count|please count|count for me] [from|] {a} [to|up to|until] {b}",
        "[list|write|give me|say] the numbers [from|between] {a} [to|and|until] {b}",
        "[numbers|all numbers] from {a} to {b}",
        "start at {a} and count to {b}",
    )
    return _ask(s, asks, a=numbers[0], b=numbers[-1]), "I count.", f"{', '.join(numbers)}."


def _pick(s: Source) -> Turn:
    items = _words(s, 3, 6)
    place = s.number(0, min(4, len(items) - 1))
    which = _ORDINALS[place]
    if s.chance(0.35):
        place, which = -1, "last"
    sentence = s.chance(0.4)
    thing = "word" if sentence else "[item|word|one|entry|element]"
    asks: tuple[str, ...] = (
        f"[what is|what's|whats|give me|tell me|say|which is] the {which} {thing} [of|in][:|] {{x}}",
        f"{{x}}. [what is|what's|tell me|which is|give me] the {which} {thing}",
        f"{which} {thing} of[:|] {{x}}",
        f"[look at|take|in] [this|the] [list|text|line]: {{x}}. [which is|what is] the {which} {thing}",
        f"[the|] {which} {thing}[:|,|] {{x}}",
    )
    text = " ".join(items) if sentence else ", ".join(items)
    if s.chance(0.3):
        text = s.pick(("'{}'", '"{}"')).format(text)
    return _ask(s, asks, x=text), f"The {which} one.", f"{items[place]}"


def _reverse(s: Source) -> Turn:
    items = _words(s, 3, 6)
    asks: tuple[str, ...] = (
        "[reverse|turn around|flip|invert] [the list|the order of|these|the words|this|][:|] {x}",
        "[write|say|list|give me] {x} [backwards|in reverse order|in reverse|from the end]",
        "{x} [backwards|in reverse|reversed|the other way round]",
        "[turn|put] {x} the other way round",
    )
    return _ask(s, asks, x=", ".join(items)), "I reverse the order.", f"{', '.join(items[::-1])}."


def _contains(s: Source) -> Turn:
    items = _words(s, 2, 6)
    there = s.chance(0.5)
    word = s.pick(items) if there else s.noun()
    there = word in items
    asks: tuple[str, ...] = (
        "[is|can you see|do you see] {w} [in|on] [the list|this list|here|this][:|] {x}",
        "[does|do] [this list|the list|these] [contain|have|include] {w}[:|?] {x}",
        "{x}: [is {w} there|is {w} in it|does it have {w}]",
        "here is a list: {x}. is {w} part of it",
    )
    quoted = s.pick(("{}", "'{}'", '"{}"')).format(word)
    answer = f"Yes, {word} is in the list." if there else f"No, {word} is not in the list."
    return _ask(s, asks, x=", ".join(items), w=quoted), f"I look for {word}.", answer


def _repeat(s: Source) -> Turn:
    text = MAKERS[s.pick(("sentence", "query", "task", "code", "path", "full_name"))].make(s).value
    asks: tuple[str, ...] = (
        "[repeat|say|echo|write|copy|type|print][:| after me:| exactly:| this:|] {x}",
        "[please|can you|now|just] [repeat|say|echo|write] {x}",
        "[repeat|echo|say back] [what I say|my words|this text|the following][:|,] {x}",
        "I say {x} and you repeat it",
    )
    return _ask(s, asks, x=s.pick(("{}", "'{}'", '"{}"')).format(text)), "I repeat it.", text


def _change(s: Source) -> Turn:
    text = " ".join(_words(s, 1, 4))
    kind = s.number(0, 2)
    if kind == 0:
        way, result = (
            "[upper case|uppercase|capitals|capital letters|caps|big letters]",
            text.upper(),
        )
    elif kind == 1:
        way, result = "[lower case|lowercase|small letters]", text
        text = text.upper()
    else:
        text = s.noun()[:8]
        asks: tuple[str, ...] = (
            "[spell|please spell|can you spell|spell out] [the word |]{x}[ for me|]",
            "how [do you spell|is] {x}[ spelled|]",
            "{x}[, spell it|, letter by letter]",
            "[the |]spelling of {x}",
        )
        quoted = s.pick(("{}", "'{}'", '"{}"')).format(text)
        return _ask(s, asks, x=quoted), f"I spell {text}.", "-".join(text)
    asks = (
        f"[write|put|turn|convert|change|make|say] {{x}} [in|into|to] {way}",
        f"{{x}} in {way}",
        f"[make|turn|convert] [this|the text|these words] [to|into|in|] {way}[:|] {{x}}",
        f"{way}: {{x}}",
    )
    return (
        _ask(s, asks, x=s.pick(("{}", "'{}'", '"{}"')).format(text)),
        "I change the case.",
        result,
    )


def _json(s: Source) -> Turn:
    if s.chance(0.3):
        items = _words(s, 2, 5)
        asks: tuple[str, ...] = (
            "[make|write|create|give me|build|I need] a json [list|array] [of|with|from|:] {x}",
            "[turn|convert|put|change] {x} [into|to|in] a json [list|array]",
            "{x} as [a |]json [list|array]",
            "json [list|array][:|] {x}",
        )
        return (
            _ask(s, asks, x=_listed(s, items).replace(" and ", ", ")),
            "I write JSON.",
            json.dumps(items),
        )
    keys = s.sample(lambda: s.word(NOUNS), s.number(1, 4))
    values = [s.number(0, 9999) if s.chance(0.4) else s.name() for _ in keys]
    joint = s.pick((" ", " ", " is ", " = ", ": ", "="))
    fields = [f"{k}{joint}{v}" for k, v in zip(keys, values, strict=True)]
    said = fields[0] if len(fields) == 1 else f"{', '.join(fields[:-1])} and {fields[-1]}"
    if s.chance(0.4):
        said = s.pick((", ", "; ")).join(fields)
    asks = (
        "[make|write|create|give me|build|I need] [a |]json [object|] [of|with|from|for][:|] {x}",
        "[turn|convert|put|change] [this |] [into|to|in] [a |]json[ object|][:|] {x}",
        "{x} [as|in|to] [a |]json[ object|]",
        "json[ object|][:|] {x}",
        "[answer|reply] [in|with|as] json[:|] {x}",
        "[the following|this] as json: {x}",
    )
    return _ask(s, asks, x=said), "I write JSON.", json.dumps(dict(zip(keys, values, strict=True)))


def _calendar(s: Source) -> Turn:
    names, unit = (_DAYS, "day") if s.chance(0.6) else (_MONTHS, "month")
    at = s.number(0, len(names) - 1)
    later = s.chance(0.6)
    where = "[after|follows|comes after|is after]" if later else "[before|comes before|is before]"
    asks: tuple[str, ...] = (
        f"[which|what] {unit} {where} {{x}}",
        f"[the |]{unit} {'after' if later else 'before'} {{x}}",
        f"what comes {'after' if later else 'before'} {{x}}",
        f"{{x}}, [which|what] is the {unit} {'after' if later else 'before'} that",
    )
    result = names[(at + (1 if later else -1)) % len(names)]
    answer = f"{result} comes {'after' if later else 'before'} {names[at]}."
    return _ask(s, asks, x=names[at]), "I know the order.", answer


def _remember(s: Source) -> Turn:
    """A fact and a question about it in one text."""
    thing = s.pick(
        ("code", "room", "name", "city", "number", "key", "seat", "color", "team", "train")
    )
    thing = f"{s.word(NOUNS)} {thing}" if s.chance(0.4) else thing
    coded = f"{s.pick('ABCDEF')}{s.digits(1, 3)}"
    value = s.pick((s.name(), s.noun(), s.digits(2, 5), coded))
    owner = s.pick(("my", "my", "the", "our", f"{s.name()}'s"))
    yours = "your" if owner == "my" else owner
    asks: tuple[str, ...] = (
        "[remember|note|listen|keep in mind][:| that|,] {o} {t} is {v}. [what is|what's|tell me] {o} {t}",
        "{o} {t} is {v}. [what is|what's|whats|tell me|say] {o} {t}",
        "[I tell you|you should know] that {o} {t} is {v}. [now say|which is|what is] {o} {t}",
        "if {o} {t} is {v}, [what is|then what is] {o} {t}",
    )
    answer = f"{yours[:1].upper()}{yours[1:]} {thing} is {value}."
    return _ask(s, asks, o=owner, t=thing, v=value), f"The text says the {thing}.", answer


_TASKS: tuple[tuple[Callable[[Source], Turn], float], ...] = (
    (_sort, 2.5), (_extreme, 1), (_compare, 2), (_count, 2), (_count_up, 0.7), (_pick, 1.3),
    (_reverse, 1), (_contains, 1), (_repeat, 1.5), (_change, 1.2), (_json, 1.5), (_calendar, 0.7),
    (_remember, 1.3),
)  # fmt: skip
