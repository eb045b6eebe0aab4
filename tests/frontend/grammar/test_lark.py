"""Text and patterns in Lark, and patterns that match anywhere."""

import json
import re

import pytest
from glimmer.frontend.grammar.lark import TEXT, Lark, choice, literal, pattern, search
from glimmer.frontend.grammar.source import FieldError, GrammarSource, OutputFormat
from schemas import Walks

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
    r"a/b#c \x20",
    "a\nb",
    r"(?i)ab",
]
REFUSED = {
    r"(?=a)b": "look-around",
    r"(?<!a)b": "look-around",
    r"(a)\1": "backreferences",
    r"\bx": "lookarounds",
    r"a^b": "lookarounds",
    r"a$b": "lookarounds",
    "[": "unclosed",
    "a{2,1}": "repetition",
    "[^\x00-\U0010ffff]": "matches nothing",
}


def write(regex: str, walks: Walks) -> str:
    return walks.text(GrammarSource(OutputFormat("regex", regex, "field")))


@pytest.mark.parametrize("regex", PATTERNS)
def test_texts_of_the_grammar_match_the_pattern(regex: str, walks: Walks) -> None:
    text = write(regex, walks)
    ended = [out for seed in range(25) if (out := walks.walk(text, seed)) is not None]
    assert len(ended) > 15
    for out in ended:
        assert re.fullmatch(regex, out, re.ASCII), out
    if regex == r"(a|bc)*d":
        assert len(set(ended)) > 3


@pytest.mark.parametrize("regex", REFUSED)
def test_what_no_automaton_holds_is_refused(regex: str, walks: Walks) -> None:
    with pytest.raises(FieldError, match=REFUSED[regex]) as caught:
        write(regex, walks)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


ANYWHERE = ["a", "^a", "a$", "^a$", "^a|b$", "(a|b)", r"\$", r"a\\$", "[|]", r"[^|\]]$", "", "a||b"]


@pytest.mark.parametrize("regex", ANYWHERE)
def test_patterns_that_match_anywhere(regex: str, walks: Walks) -> None:
    lark = Lark()
    text = lark.text(lark.terminal(search(regex)))
    for sample in ("a", "b", "ab", "ba", "xax", "", "$", "a\\", "a|", "|", "]", "\na"):
        assert walks.takes(text, sample) == bool(re.search(regex, sample)), sample


def test_wrong_parentheses_do_not_escape() -> None:
    for regex in ("a)|(b", "(a", ")"):
        with pytest.raises(ValueError, match="parentheses"):
            search(regex)


def test_every_text_can_be_a_literal(walks: Walks) -> None:
    texts = ['a"b', "back\\slash", "new\nline", "é\U0001f600", "\x00", "</s>", "\u2028", "ab"]
    assert literal("é") == json.dumps("é")
    lark = Lark()
    text = lark.text(lark.any_of([lark.terminal(choice([*texts, "ab"]))]))
    assert all(walks.takes(text, sample) for sample in texts)
    assert not walks.takes(text, "a")


def test_equal_rules_are_one() -> None:
    lark = Lark()
    first = lark.rule('"a" "b"')
    assert lark.rule('"a" "b"') == first
    assert lark.terminal('"a" "b"') != first
    assert lark.any_of([first]) == first
    assert lark.terminal(pattern("a/b")) == "T2"
    assert lark.text(TEXT).splitlines() == [
        "start: TEXT",
        "TEXT: /(?s:.*)/",
        'r0: "a" "b"',
        'T1: "a" "b"',
        "T2: /a\\/b/",
    ]
