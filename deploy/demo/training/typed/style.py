"""Types a frame as people do: polite or curt, careful or careless. Fields in braces stay."""

import functools
import re
from collections.abc import Callable

from ..words import Source
from .grammar import expand

_BEFORE = (
    "[please|pls|hey,|hi,|hello,|hey|hi|ok|okay,|so|ok so|um|yo|right,|now|quick one:|sorry,|"
    "one more thing:|good morning,|hi there,|hello again,|Question:|excuse me,|alright,|next:|"
    "for my trip:|quick question,|thanks. now|great,|hmm,|well,]"
)
_AFTER = (
    "[ please| pls| plz| thanks| thx|, please|, thanks|, thank you| asap| when you can| for me|"
    " real quick|, if you can| ok?|. Thanks!|. Thank you.|. thx| ty| cheers| mate| right away| !]"
)
_WORD = re.compile(r"\{\w*\}|[^\W\d_]{4,}")
_NO_APOSTROPHE = str.maketrans("", "", "'’")


def typed(s: Source, frame: str) -> str:
    """The frame in one of the styles. Sometimes a word is misspelled."""
    rng = s.rng
    if rng.random() < 0.14:
        before = expand(rng, _BEFORE)
        if not frame.startswith(("I ", "I'", "{")):
            frame = frame[:1].lower() + frame[1:]
        frame = f"{before} {frame}"
    if rng.random() < 0.14:
        frame = frame.rstrip("?.!") + expand(rng, _AFTER)
    care = rng.random()
    if care < 0.32:
        frame = _outside_fields(frame, str.lower).rstrip(".!")
        if rng.random() < 0.5:
            frame = frame.translate(_NO_APOSTROPHE)
        if rng.random() < 0.6:
            frame = frame.rstrip("?")
    elif care < 0.35:
        frame = _outside_fields(frame, str.upper)
    elif care < 0.42:
        frame = frame.rstrip("?.!")
    else:
        frame = frame[:1].upper() + frame[1:]
    if rng.random() < 0.12:
        frame = _with_typo(s, frame)
    if rng.random() < 0.03:
        frame += s.pick(("!", "!!", "?", "??", "...", " :)", "\n", " "))
    return frame


def careless(s: Source, frame: str) -> str:
    """The frame with fewer additions: for what is short, such as a greeting."""
    rng = s.rng
    if rng.random() < 0.4:
        frame = _outside_fields(frame, str.lower)
        if rng.random() < 0.5:
            frame = frame.translate(_NO_APOSTROPHE)
    elif rng.random() < 0.05:
        frame = _outside_fields(frame, str.upper)
    else:
        frame = frame[:1].upper() + frame[1:]
    end = rng.random()
    if end < 0.35:
        frame = frame.rstrip("?.!")
    elif end < 0.42:
        frame = frame.rstrip("?.!") + s.pick(("!", ".", "?", "!!", "..", " :)"))
    return _with_typo(s, frame) if rng.random() < 0.06 else frame


@functools.cache
def _pieces(frame: str) -> tuple[str, ...]:
    return tuple(re.split(r"(\{\w*\})", frame))


def _outside_fields(frame: str, change: Callable[[str], str]) -> str:
    return "".join(p if p.startswith("{") else change(p) for p in _pieces(frame))


def _with_typo(s: Source, frame: str) -> str:
    """The frame with one letter of a word dropped, doubled, changed or swapped with the next."""
    words = [match for match in _WORD.finditer(frame) if match[0][0] != "{"]
    if not words:
        return frame
    word = s.pick(words)
    at = s.number(word.start() + 1, word.end() - 2)
    kind = s.number(0, 3)
    if kind == 0:
        return frame[:at] + frame[at + 1 :]
    if kind == 1:
        return frame[:at] + frame[at] + frame[at:]
    if kind == 2:
        return frame[:at] + s.pick("aeinorst") + frame[at + 1 :]
    return frame[:at] + frame[at + 1] + frame[at] + frame[at + 2 :]
