"""Reads a Containerfile: its stages, each with its instructions."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).parents[2] / "deploy" / "container" / "Containerfile"


@dataclass
class Stage:
    """One FROM and what follows. `steps` are pairs such as ("RUN", "apt-get update")."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str:
        """The text of the last such instruction; "" if there is none."""
        return next((text for word, text in reversed(self.steps) if word == instruction), "")


def parse(text: str, arguments: Mapping[str, str]) -> dict[str, Stage]:
    """The stages by name. `arguments` win over the defaults of ARG before the first FROM."""
    values: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for word, rest in instructions(text):
        if word == "FROM":
            match = re.fullmatch(r"(\S+)(?: AS (\S+))?", substitute(rest, values))
            assert match, rest
            stage = Stage(match[1], match[2] or str(len(stages)))
            stages[stage.name] = stage
        elif stage is None:
            assert word == "ARG", f"{word} before FROM"
            name, _, default = rest.partition("=")
            values[name] = arguments.get(name, default)
        else:
            stage.steps.append((word, rest))
    return stages


def instructions(text: str) -> list[tuple[str, str]]:
    """Instructions with their texts. Comments are dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(word.upper(), rest.strip()) for word, _, rest in pairs]


def substitute(text: str, values: Mapping[str, str]) -> str:
    """Replace $NAME and ${NAME}."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], text)


def pairs(text: str, values: Mapping[str, str]) -> dict[str, str]:
    """The settings of ENV or LABEL."""
    words = shlex.split(substitute(text, values))
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def words(text: str) -> list[str]:
    """The words of an ENTRYPOINT or CMD, which must have the form of JSON."""
    result = json.loads(text)
    assert isinstance(result, list), text
    return result
