"""JSON numbers between two limits as EBNF expressions."""

import math
from fractions import Fraction

from .ebnf import literal
from .problems import SourceError

INTEGER = '"-"? ("0" | [1-9] [0-9]{0,14})'  # every one of them is exact in a double
NUMBER = INTEGER + ' ("." [0-9]{1,15})? ([eE] [+\\-]? [0-9]{1,2})?'
_DECIMALS = (0, 1, 2, 4)  # of numbers with limits
_MAX_DIGITS = 15
Limits = tuple[Fraction | None, Fraction | None]  # least, most; None: no limit


def integer(limits: Limits) -> str:
    """An integer within `limits`. Raises SourceError if there is none."""
    if limits == (None, None):
        return INTEGER
    found = _scaled(limits, 0)
    if not found:
        raise SourceError("no integer lies within the limits")
    return " | ".join(found)


def number(limits: Limits) -> str:
    """A number within `limits`, with at most four decimals if there are any limits."""
    if limits == (None, None):
        return NUMBER
    found = [text for decimals in _DECIMALS for text in _scaled(limits, decimals)]
    if not found:
        raise SourceError(f"no number of at most {_DECIMALS[-1]} decimals lies within the limits")
    return " | ".join(found)


def _scaled(limits: Limits, decimals: int) -> list[str]:
    """Numbers with exactly so many decimals: integers of `limits` times a power of ten."""
    scale, bound = 10**decimals, 10 ** (_MAX_DIGITS + decimals) - 1
    least, most = limits
    low = -bound if least is None else max(-bound, math.ceil(least * scale))
    high = bound if most is None else min(bound, math.floor(most * scale))
    if low > high:
        return []
    found = []
    if low < 0:
        negative = _digits(max(1, -high), -low, decimals)
        found += [f'"-" {text}' for text in negative]
    if high >= 0:
        found += _digits(max(0, low), high, decimals)
    return found


def _digits(low: int, high: int, decimals: int) -> list[str]:
    """low <= n <= high, both >= 0, written with a point before the last `decimals` digits."""
    found = []
    for length in range(max(len(str(low)), decimals + 1), max(len(str(high)), decimals + 1) + 1):
        shortest = length == decimals + 1
        first = max(low, 0 if shortest else 10 ** (length - 1))
        last = min(high, 10**length - 1)
        if first <= last:
            found += _same_length(str(first).zfill(length), str(last).zfill(length))
    return [_write(digits, decimals) for digits in found]


def _same_length(low: str, high: str) -> list[list[str]]:
    """Digit strings from low to high as lists of digits and of ranges such as "3-7"."""
    if not low:
        return [[]]
    if set(low) == {"0"} and set(high) == {"9"}:
        return [["0-9"] * len(low)]
    if low[0] == high[0]:
        return [[low[0], *rest] for rest in _same_length(low[1:], high[1:])]
    first, last = int(low[0]), int(high[0])
    found = []
    if set(low[1:]) - {"0"}:
        found += [[low[0], *rest] for rest in _same_length(low[1:], "9" * len(low[1:]))]
        first += 1
    tail = []
    if set(high[1:]) - {"9"}:
        tail = [[high[0], *rest] for rest in _same_length("0" * len(high[1:]), high[1:])]
        last -= 1
    if first <= last:
        found.append([f"{first}-{last}", *["0-9"] * len(low[1:])])
    return found + tail


def _write(digits: list[str], decimals: int) -> str:
    parts = [f"[{digit}]" if len(digit) > 1 else literal(digit) for digit in digits]
    if decimals:
        parts.insert(len(parts) - decimals, literal("."))
    return " ".join(parts)
