"""Patterns match as Python's `re.fullmatch` does, and bombs are refused at once."""

import re

import pytest
from glimmer.frontend.grammar.ebnf import Rules, chars
from glimmer.frontend.grammar.problems import SourceError
from glimmer.frontend.grammar.regex import PatternWriter
from grammars import Walk

PATTERNS = [
    r"^[a-z]{2,5}@[a-z]+\.com$",
    r"(a|bc)*d",
    r"(a*b*)*c",
    r"((a*)*b*)*",
    r"\d{3}-\d{4}|x+",
    r"[^a-c\n]{3}",
    r"(?:foo|bar){2,3}?",
    r"^(yes|no)$",
    r"^a$|^b$",
    r"a?b?c?",
    r"\w+\s\D\W\S",
    r"[\u00e9-\u4e00]{1,3}é",
    r"^$",
    r"(?P<x>x|y)?(z(w)?)*",
    r"(a?){3}b{2,}",
    r"[\]\\^-]+\"",
]
BOMBS = {
    r"(a{1000}){1000}": "states",
    "(((((a{30}){30}){30}){30})": "not a valid pattern",
    "((((a{30}){30}){30}){30})": "states",
    "((a?){900}){900}": "states",
    "a{100000}": "repeats more than 1024",
    "(" * 2000 + "a" + ")" * 2000: "nested too deeply",
    "(" * 60 + "a+" + ")+" * 60 + "b{1025}": "repeats",
    "a{1,99999999999999999999}": "repeats|too often",
    r"(?i)a": "flags",
    r"(?i:a)": "flags",
    r"(?=a)b": "not supported",
    r"(?<!a)b": "not supported",
    r"(a)\1": "not supported",
    r"\bx": "not supported",
    r"a^b": "not supported",
    r"a$b": "not supported",
    "[": "not a valid pattern",
    r"\p{L}": "not a valid pattern",
    "[^\x00-\U0010ffff]": "never match",
}


def write(pattern: str) -> str:
    rules = Rules()
    return rules.text([PatternWriter(rules).write(pattern, '""')])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_texts_of_the_grammar_match_the_pattern(pattern: str, walk: Walk) -> None:
    text = write(pattern)
    found = [walk(text, seed) for seed in range(25)]
    ended = [out for out in found if out is not None]
    assert len(ended) > 15
    for out in ended:
        assert re.fullmatch(pattern, out, re.ASCII), out
    if pattern == r"(a|bc)*d":
        assert len(set(ended)) > 3


@pytest.mark.parametrize("pattern", BOMBS)
def test_bombs_and_the_unsupported_are_refused(pattern: str) -> None:
    with pytest.raises(SourceError, match=BOMBS[pattern]):
        write(pattern)


def test_catastrophic_backtracking_is_none_here(walk: Walk) -> None:
    for pattern in ("(a+)+$", "(x+x+)+y", "(a|a)*b", "(.*)*c"):
        assert walk(write(pattern), 1) is not None or pattern == "(.*)*c"


def test_lengths_are_counted(walk: Walk) -> None:
    rules = Rules()
    text = rules.text([PatternWriter(rules).repeat_chars(chars("é"), 2, 4, '"."')])
    assert {walk(text, seed) for seed in range(60)} == {"éé.", "ééé.", "éééé."}
