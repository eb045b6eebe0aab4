"""Lark grammars for llguidance: equal rules once, text and patterns spelled safely."""

import json
import re

TEXT = "TEXT"  # any text; tags are tokens of their own, which it cannot spell
NOTHING = "/[^\\x00-\\U0010ffff]/"  # a terminal without a text
_ANY = "(?s:.*)"


class Lark:
    """A grammar that is being written. Expressions are text that may stand on a right-hand side."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # "prefix body" -> name
        self._bodies: dict[str, str] = {}  # of reserved rules
        self.shared: dict[str, str] = {}  # expressions that writers keep for each other

    def rule(self, body: str) -> str:
        """An expression for a rule."""
        return self._name("r", body)

    def any_of(self, found: list[str]) -> str:
        """An expression for one of several."""
        return found[0] if len(found) == 1 else self.rule(" | ".join(found))

    def reserve(self) -> str:
        """An expression for a rule that `define` writes later: it may lead to itself."""
        name = f"r{len(self._names)}"
        self._names[f"r {name}"] = name
        return name

    def define(self, name: str, body: str) -> None:
        """Write the rule that was reserved as `name`."""
        self._bodies[name] = body

    def terminal(self, body: str) -> str:
        """An expression for a terminal, whose body is a regular expression in Lark's form."""
        return self._name("T", body)

    def text(self, start: str) -> str:
        """The grammar that begins with the expression `start`."""
        lines = [f"start: {start}", f"{TEXT}: /{_ANY}/"]
        for key, name in self._names.items():
            lines.append(f"{name}: {self._bodies.get(name) or key.partition(' ')[2]}")
        return "\n".join(lines)

    def _name(self, prefix: str, body: str) -> str:
        return self._names.setdefault(f"{prefix} {body}", f"{prefix}{len(self._names)}")


def literal(text: str) -> str:
    """A terminal for exactly this text."""
    return json.dumps(text)


def choice(texts: list[str]) -> str:
    """The body of a terminal for one of the texts."""
    return " | ".join(map(literal, dict.fromkeys(texts)))


def token(token_id: int) -> str:
    """The token with this id."""
    return f"<[{token_id}]>"


def pattern(regex: str) -> str:
    r"""A terminal for a text that matches as a whole. Classes such as `\w` are ASCII."""
    from llguidance import regex_to_lark  # only the checking process needs it

    return f"/{regex_to_lark(regex, 'dws')}/"


def search(regex: str) -> str:
    """A terminal for a text that matches somewhere. Raises ValueError for wrong parentheses."""
    found = []
    for part in _alternatives(regex):
        begin = "" if part.startswith("^") else _ANY
        end = "" if re.search(r"(?<!\\)(\\\\)*\$$", part) else _ANY
        found.append(f"{begin}(?:{part}){end}")
    return pattern("|".join(found))


def _alternatives(regex: str) -> list[str]:
    """The parts of a pattern between the `|` that are in no parentheses."""
    parts = [""]
    depth = 0
    for piece in re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]?|.", regex, re.DOTALL):
        depth += (piece == "(") - (piece == ")")
        if depth < 0:
            raise ValueError("unbalanced parentheses")
        if piece == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    if depth:
        raise ValueError("unbalanced parentheses")
    return parts
