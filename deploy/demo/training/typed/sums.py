"""Arithmetic with a short visible calculation, digit by digit, as it is done on paper.

`solve` is the only place that calculates. An arrow points to the result so far: the last digits of
a sum or product, the first digits of a quotient.
"""

from ..words import Source
from .grammar import expand, request_frame
from .style import careless, typed

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
_KNOWN_BY_HEART = 12  # products up to 12 * 12 need no calculation
_SIGNS = {
    "+": (
        "{a}[ + |+| +|+ ]{b}[| =|=| = ?|?| = |=?]",
        "[what is|what's|whats|how much is|how much are|compute|calculate|solve|work out|tell me|"
        "can you do|do you know|give me|find] {a}[ + |+| plus | and ]{b}",
        "[add|add up|sum up|sum] {a} [and|to|plus|with|+] {b}",
        "[what is|what's|give me|find|tell me|I need] the [sum|total] of {a} and {b}",
        "[the sum of|sum|total of|the total of] {a} and {b}",
        "{a} plus {b}[| is| equals| makes| gives|, what is it]",
        "[what do you get|what do I get] [when you|if I|if you] add {a} [and|to] {b}",
        "[what does|how much does] {a}[ + | plus |+]{b} [make|equal|give|come to]",
        "[increase|raise] {a} by {b}",
    ),
    "-": (
        "{a}[ - |-| -|- | − ]{b}[| =|=| = ?|?| = ]",
        "[what is|what's|whats|how much is|compute|calculate|solve|work out|tell me|give me|find] "
        "{a}[ - |-| minus | less ]{b}",
        "[subtract|take|take away] {b} from {a}",
        "[what is|what's|give me|find] the difference [of|between] {a} and {b}",
        "{a} minus {b}[| is| equals| makes|, what is it]",
        "[what is left|how much is left|what remains] [if I|when you] take {b} [from|away from] {a}",
        "[decrease|reduce|lower] {a} by {b}",
        "[what does|how much does] {a}[ - | minus ]{b} [make|equal|give]",
    ),
    "*": (
        "{a}[ * |*| x |x| × |×| X ]{b}[| =|=| = ?|?| = ]",
        "[what is|what's|whats|how much is|compute|calculate|solve|work out|tell me|give me|find] "
        "{a}[ * |*| times | x | × | multiplied by ]{b}",
        "multiply {a} [by|with|and|times] {b}",
        "[what is|what's|give me|find] the product of {a} and {b}",
        "{a} times {b}[| is| equals| makes|, what is it]",
        "[what do you get|what do I get] [when you|if I] multiply {a} [by|with] {b}",
        "[product of|the product of] {a} and {b}",
    ),
    "/": (
        "{a}[ / |/| : | ÷ |÷]{b}[| =|=| = ?|?| = ]",
        "[what is|what's|whats|how much is|compute|calculate|solve|work out|tell me|give me|find] "
        "{a}[ / |/| divided by | over | ÷ ]{b}",
        "divide {a} by {b}",
        "[what is|what's|find] the quotient of {a} and {b}",
        "{a} divided by {b}[| is| equals| makes]",
        "[how many times|how often] [does|will] {b} [go|fit] into {a}",
        "[split|share] {a} [into|in] {b} equal parts[, how much is one|, how big is each|]",
    ),
}
_STORIES = {
    "+": (
        "[{n}|I] [has|have|had] {a} {t} and [gets|get|buys|buy|finds|find|receives] {b} [more|"
        "others|new ones]. [How many are there now|How many is that|What is the total]?",
        "[there are|we have|I see|we count] {a} {t} [in one box|on the table|here] and {b} [in "
        "another|on the floor|there]. how many {t} [altogether|in total|are there]?",
        "{a} {t} and {b} {t}, how many [are that|in total|together]?",
        "{n} had {a} {t}, then {b} [were added|came|arrived]. [How many now|The total]?",
    ),
    "-": (
        "{n} [has|had] {a} {t} and [loses|gives away|sells|eats|breaks] {b}. [How many are left|How "
        "many remain|What is left]?",
        "[from|of] {a} {t} [we|they] [sold|lost|gave away] {b}, how many [remain|are left|stay]?",
        "I [have|had] {a} {t}, [used|spent|gave away] {b}, [what is left|how many are left over]?",
        "{a} {t} [minus|without] {b} {t} [is|are] how many?",
    ),
    "*": (
        "[there are|I have|we bought|they sell] {a} [boxes|bags|packs|shelves|rows] with {b} {t} "
        "[each|in each]. how many {t} [is that|are there|in total]?",
        "one [ticket|book|bag|shirt] costs {a} [euros|dollars], what do {b} cost?",
        "{a} [people|kids|teams] get {b} {t} each, how many {t} [are needed|do we need]?",
        "{n} [reads|writes|makes|eats] {a} {t} a day. How many in {b} days?",
    ),
    "/": (
        "[share|split|divide] {a} {t} [among|between] {b} [people|kids|friends], how many [does each "
        "get|for each one]?",
        "{a} {t} [fit|go|are put] into {b} equal [boxes|bags|rows]. How many {t} per [box|bag|row]?",
        "{b} [people|friends] pay {a} [euros|dollars] together, how much [does each pay|is it each]?",
        "{n} packs {a} {t} into bags of {b}. How many bags?",
    ),
}
_THINGS = (
    "apples pens books cards coins eggs toys tickets plates balls stamps flowers bottles".split()
)
_NAMES = "Anna Leo Mia Sam Nora Ben Ella Max Ida Tim".split()


def spelled(number: int) -> str:
    """The English words for 0 to 999."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return _TENS[tens] + (f"-{_UNITS[rest]}" if rest else "")
    hundreds, rest = divmod(number, 100)
    return f"{_UNITS[hundreds]} hundred" + (f" and {spelled(rest)}" if rest else "")


def solve(a: int, sign: str, b: int) -> tuple[str, str]:
    """(calculation, statement) such as ("8+6=14 → 4; 4+7+1=12 → 24; ...", "348 + 276 = 624."). The
    calculation is empty where none is needed. Raises ValueError for an unknown sign."""
    match sign:
        case "+":
            steps, result = _add(a, b), str(a + b)
        case "-":
            steps, result = _subtract(a, b), str(a - b)
        case "*":
            steps, result = _multiply(a, b), str(a * b)
        case "/":
            steps, result = _divide(a, b)
        case _:
            raise ValueError(f"no such sign: {sign}")
    return steps, f"{a} {sign} {b} = {result}."


def _add(a: int, b: int) -> str:
    carries = a % 10 + b % 10 >= 10
    is_digit_more = min(a, b) < 10 and max(a, b) < 100 and not carries
    if is_digit_more or a + b <= 20 or 0 in (a, b):
        return ""
    return _column(a, b)


def _column(a: int, b: int) -> str:
    """Digits are added from the right; the carry is the third summand."""
    steps, carry, done = [], 0, ""
    while a or b or carry:
        digits = [a % 10, b % 10] + ([carry] if carry else [])
        if not (a or b):
            digits = [carry]
        total = sum(digits)
        a, b, carry = a // 10, b // 10, total // 10
        last = not (a or b)
        done = (str(total) if last else str(total % 10)) + done
        steps.append(f"{'+'.join(map(str, digits))}={total} → {done}")
        if last:
            break
    return "; ".join(steps)


def _subtract(a: int, b: int) -> str:
    if a < b:
        steps = _subtract(b, a)
        found = f"{b}-{a}={b - a}, so -{b - a}"
        return f"{a} is less than {b}. {steps}{'; ' if steps else ''}{found}"
    if a <= 20 or b == 0 or (b < 10 and b <= a % 10):
        return ""
    lines, borrow, done = [], 0, ""
    while a or b:
        top, bottom = a % 10, b % 10
        lent = 10 if top - bottom - borrow < 0 else 0
        digit = top + lent - bottom - borrow
        text = f"{top}{'+10' if lent else ''}-{bottom}{'-1' if borrow else ''}={digit}"
        a, b, borrow = a // 10, b // 10, 1 if lent else 0
        done = str(digit) + done
        lines.append(f"{text} → {done}")
    plain = done.lstrip("0") or "0"
    return "; ".join(lines) + (f" = {plain}" if plain != done else "")


def _multiply(a: int, b: int) -> str:
    if (max(a, b) <= _KNOWN_BY_HEART) or min(a, b) <= 1:
        return ""
    if len(str(a).strip("0")) < len(str(b).strip("0")):
        a, b = b, a
    parts, texts = [], []
    for place, digit in enumerate(reversed(str(b))):
        if digit == "0":
            continue
        part = a * int(digit) * 10**place
        zeros = f", with {'0' * place}: {part}" if place else ""
        texts.append(f"{a}*{digit}: {_times_digit(a, int(digit))}{zeros}")
        parts.append(part)
    total = parts[0]
    for part in parts[1:]:
        texts.append(f"{total}+{part}: {_column(total, part)}")
        total += part
    return ". ".join(texts)


def _times_digit(a: int, digit: int) -> str:
    steps, carry, done = [], 0, ""
    while a:
        figure = a % 10
        total = figure * digit + carry
        a, last_carry = a // 10, carry
        done = (str(total % 10) if a else str(total)) + done
        carry = total // 10
        plus = f"+{last_carry}" if last_carry else ""
        steps.append(f"{figure}*{digit}{plus}={total} → {done}")
    return "; ".join(steps)


def _divide(a: int, b: int) -> tuple[str, str]:
    """Long division. A division by zero or with a rest says so."""
    if b == 0:
        return "", "impossible: nothing can be divided by 0"
    quotient, rest = divmod(a, b)
    result = str(quotient) if rest == 0 else f"{quotient} rest {rest}"
    if b == 1 or a < b or (b <= _KNOWN_BY_HEART and quotient <= _KNOWN_BY_HEART and not rest):
        return "", result
    steps, done, rest = [], "", 0
    for figure in str(a):
        current = rest * 10 + int(figure)
        digit, rest = divmod(current, b)
        if not done and not digit:
            continue
        done += str(digit)
        steps.append(f"{current}: {b}*{digit}={b * digit}, rest {rest} → {done}")
    return "; ".join(steps), result


def make_numbers(s: Source, sign: str) -> tuple[int, int]:
    """Two numbers for the sign, of one to three digits. Divisions are mostly exact."""
    digits = s.pick(((1, 1), (1, 2), (2, 1), (2, 2), (2, 2), (3, 1), (3, 2), (3, 3), (3, 3)))
    a, b = (s.number(0 if n == 1 else 10 ** (n - 1), 10**n - 1) for n in digits)
    if s.chance(0.12):
        a = s.pick((10, 20, 25, 50, 64, 75, 99, 100, 125, 128, 200, 250, 256, 300, 500, 999, 1000))
    if s.chance(0.08):
        b = s.pick((10, 20, 25, 50, 64, 99, 100, 101, 250, 500))
    if sign == "-" and a < b and s.chance(0.75):
        a, b = b, a
    if sign == "/":
        b = max(b, 1)
        if b > 99 and s.chance(0.8):
            b = s.number(2, 30)
        if s.chance(0.88):
            a = b * s.number(1, max(1, 999 // b))
    return a, b


def sum_turn(s: Source, thinks: bool) -> tuple[str, str, str]:
    """(request, thought, answer) of one calculation. Without thinking the calculation is part of
    the answer."""
    kind = s.number(0, 19)
    if kind == 0:
        return _special(s, thinks)
    sign = s.pick("++--***//")
    a, b = make_numbers(s, sign)
    if kind <= 3:
        if sign == "/" and a % b:
            a = a // b * b or b
        frame = typed(s, request_frame(s, _STORIES[sign]))
        words = {"{n}": s.pick(_NAMES), "{t}": s.pick(_THINGS), "{a}": str(a), "{b}": str(b)}
    else:
        frame = request_frame(s, _SIGNS[sign])
        frame = typed(s, frame) if s.chance(0.7) else careless(s, frame)
        is_words = s.chance(0.15) and max(a, b) < 1000
        words = {
            "{a}": spelled(a) if is_words else str(a),
            "{b}": spelled(b) if is_words else str(b),
        }
    for field, word in words.items():
        frame = frame.replace(field, word)
    return _turn(frame, [(a, sign, b)], thinks)


def _turn(frame: str, sums: list[tuple[int, str, int]], thinks: bool) -> tuple[str, str, str]:
    steps, statement = "", ""
    said = []
    for a, sign, b in sums:
        steps, statement = solve(a, sign, b)
        said.append(f"{a} {sign} {b}: {steps}. {statement}" if steps else statement)
    thought = " ".join(said)
    return frame, thought, statement if thinks else thought


def _special(s: Source, thinks: bool) -> tuple[str, str, str]:
    """Squares, halves, doubles and sums of three numbers."""
    kind = s.number(0, 3)
    a = s.number(2, 99)
    if kind == 0:
        rule = "[the square of {a}|{a} squared|{a}^2|square {a}|{a} to the power of 2|{a}**2]"
        sums = [(a, "*", a)]
    elif kind == 1:
        rule = "[half of {a}|the half of {a}|{a} halved|halve {a}|one half of {a}|50% of {a}]"
        a *= 2
        sums = [(a, "/", 2)]
    elif kind == 2:
        rule = "[double {a}|twice {a}|the double of {a}|two times {a}|{a} doubled]"
        sums = [(2, "*", a)]
    else:
        b, c = s.number(1, 99), s.number(1, 99)
        rule = (
            f"[{{a}} + {b} + {c}|{{a}}+{b}+{c}|add {{a}}, {b} and {c}|{{a}} plus {b} plus {c}|"
            f"the total of {{a}}, {b} and {c}|sum up {{a}}, {b}, {c}]"
        )
        sums = [(a, "+", b), (a + b, "+", c)]
    before = "[what is |what's |calculate |how much is |||tell me ||]"
    frame = careless(s, expand(s.rng, before + rule)).replace("{a}", str(a))
    return _turn(frame, sums, thinks)
