"""Characters of JSON strings, and the formats."""

import datetime
import ipaddress
import json
import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from glimmer.frontend.grammar.ebnf import ANY_CHAR, Rules, chars
from glimmer.frontend.grammar.regex import PatternWriter
from glimmer.frontend.grammar.strings import FORMATS, dump, string_chars
from grammars import Walk


def test_every_character_of_a_set_can_be_written_and_no_other(walk: Walk) -> None:
    wanted = 'a"\\\n\tz/'
    rules = Rules()
    writer = PatternWriter(rules, string_chars)
    text = rules.text([f'"\\"" {writer.repeat_chars(chars(wanted), 1, 1, QUOTE)}'])
    found = {json.loads(out) for seed in range(200) if (out := walk(text, seed))}
    assert found == set(wanted)
    assert string_chars(chars("\x01")) == []  # has no short escape
    assert len(string_chars(ANY_CHAR)) == 2


QUOTE = '"\\""'
CHECKS: dict[str, Callable[[str], Any]] = {
    "date": datetime.date.fromisoformat,
    "time": lambda text: datetime.time.fromisoformat(text.replace("Z", "+00:00")),
    "date-time": lambda text: datetime.datetime.fromisoformat(text.replace("Z", "+00:00")),
    "uuid": uuid.UUID,
    "ipv4": ipaddress.IPv4Address,
    "email": lambda text: text.index("@"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_what_their_readers_take(name: str, walk: Walk) -> None:
    rules = Rules()
    text = rules.text([PatternWriter(rules).write(FORMATS[name], '""')])
    texts = [out for seed in range(15) if (out := walk(text, seed)) is not None]
    assert texts
    for out in texts:
        if name in ("date", "date-time") and out.startswith("0000"):
            continue  # a year that the standard has and Python has not
        CHECKS[name](out)


def test_a_mail_address_is_no_longer_than_mail_allows() -> None:
    def fits(text: str) -> bool:
        return re.fullmatch(FORMATS["email"], text) is not None

    assert fits("first.last+tag_1@mail-2.example.org")
    assert fits("z" * 32 + "@" + "y" * 31 + ".org")
    assert not fits("z" * 65 + "@example.org")
    assert not fits("z@" + "y" * 64 + ".org")
    assert not fits("z@example" + ".org" * 5)


def test_json_is_spelled_with_spaces_and_without_escapes() -> None:
    assert dump({"é": [1, None]}) == '{"é": [1, null]}'
