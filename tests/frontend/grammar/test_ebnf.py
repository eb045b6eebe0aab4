"""Sets of characters, escapes, shared rules, and grammars without an end."""

import pytest
from glimmer.frontend.grammar.ebnf import (
    ANY_CHAR,
    MAX_RULES,
    Rules,
    char_class,
    chars,
    complement,
    intersect,
    literal,
    token,
    union,
)
from glimmer.frontend.grammar.problems import SourceError


def test_sets_of_characters() -> None:
    assert union([(5, 9)], [(1, 3), (10, 12)], [(4, 4)]) == [(1, 12)]
    assert chars("cab") == [(97, 99)]
    assert complement([]) == ANY_CHAR
    assert complement(ANY_CHAR) == []
    assert complement(complement(chars("xy5"))) == chars("xy5")
    assert intersect([(1, 10)], [(5, 20)]) == [(5, 10)]
    assert intersect(chars("ab"), chars("cd")) == []


def test_rules_that_refer_to_themselves_are_made_once_a_key() -> None:
    rules = Rules()
    written = [rules.once(key, lambda name: ['"."', f'"a" {name}']) for key in ("x", "y", "x")]
    assert (written[0] == written[2], written[0] == written[1], len(rules)) == (True, False, 2)
    assert f'"a" {written[0]}' in rules.text([written[0]])


def test_whatever_could_be_syntax_is_escaped() -> None:
    assert literal('a "]\\é\U0001f600') == '"a \\u0022\\u005d\\u005c\\u00e9\\U0001f600"'
    assert char_class([(0x2D, 0x2D), (0x5D, 0x5E), (0x61, 0x7A)]) == "[\\u002d\\u005d-\\u005ea-z]"
    assert token(17) == "Token(17)"


def test_equal_rules_are_one() -> None:
    rules = Rules()
    first = rules.add(['"a"', '"b"', '"a"'])
    assert rules.add(['"a"', '"b"', '"a"']) == first
    assert rules.add(['"b"', '"a"']) != first
    assert rules.text([first]) == 'root ::= r1\nr1 ::= "a" | "b"\nr2 ::= "b" | "a"\n'


def test_a_grammar_that_never_ends_is_refused() -> None:
    rules = Rules()
    loop = rules.reserve()
    rules.define(loop, [f'"a" {loop}'])
    assert rules.text([f"({loop})?"])
    assert rules.text([loop, '"r1"'])  # r1 in quotes is text, not the rule
    with pytest.raises(SourceError, match="has an end"):
        rules.text([f'"x" {loop}'])
    both = rules.add([loop, f'"(" {loop}'])
    with pytest.raises(SourceError):
        rules.text([both])


def test_the_number_of_rules_is_limited() -> None:
    rules = Rules()
    for number in range(MAX_RULES):
        rules.add([str(number)])
    with pytest.raises(SourceError, match=str(MAX_RULES)):
        rules.reserve()
