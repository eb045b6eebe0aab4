"""How keywords are read."""

from fractions import Fraction
from typing import Any

import pytest
from glimmer.frontend.grammar.keywords import check_keywords, counts, is_of_type, limits, types_of
from glimmer.frontend.grammar.problems import SourceError


def test_types_are_named_or_hinted_at() -> None:
    assert types_of({"type": "null"}, "#") == ["null"]
    assert types_of({"type": ["null", "string", "null"]}, "#") == ["null", "string"]
    assert types_of({"properties": {}}, "#") == ["object"]
    assert types_of({"maxLength": 3, "minimum": 1}, "#") == ["string", "number"]
    assert len(types_of({"title": "x"}, "#")) == 7
    for wrong in ("text", 5, [5], {}):
        with pytest.raises(SourceError, match="type"):
            types_of({"type": wrong}, "#")


@pytest.mark.parametrize("key", ["not", "uniqueItems", "multipleOf", "patternProperties", "if"])
def test_what_no_grammar_holds_is_refused(key: str) -> None:
    with pytest.raises(SourceError, match=key):
        check_keywords({key: 3}, "#")


def test_harmless_values_and_unknown_words_pass() -> None:
    check_keywords({"uniqueItems": False, "multipleOf": 1, "x-mine": 3, "title": "t"}, "#")


def test_counts() -> None:
    assert counts({}, "Items", "#") == (0, None)
    assert counts({"minItems": 2, "maxItems": 3.0}, "Items", "#") == (2, 3)
    for wrong in ({"minItems": -1}, {"maxItems": 10**9}, {"minItems": 3, "maxItems": 2}):
        with pytest.raises(SourceError, match="Items"):
            counts(wrong, "Items", "#")
    for value in ("3", 1.5, True):
        with pytest.raises(SourceError, match="integer"):
            counts({"minItems": value}, "Items", "#")


def test_limits() -> None:
    assert limits({}, "#") == (None, None)
    assert limits({"minimum": 0.1, "maximum": 3}, "#") == (Fraction(1, 10), 3)
    low, high = limits({"minimum": 5, "exclusiveMinimum": 5, "exclusiveMaximum": 6}, "#")
    assert low is not None
    assert high is not None
    assert 5 < low < 5.001
    assert 5.999 < high < 6
    for wrong in ("3", True, [1]):
        with pytest.raises(SourceError, match="number"):
            limits({"minimum": wrong}, "#")


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        (None, {"null"}),
        (True, {"boolean"}),
        (3, {"integer", "number"}),
        (2.5, {"number"}),
        ("x", {"string"}),
        ([], {"array"}),
        ({}, {"object"}),
    ],
)
def test_values_have_types(value: Any, kinds: set[str]) -> None:
    every = ("null", "boolean", "integer", "number", "string", "array", "object")
    assert {kind for kind in every if is_of_type(value, kind)} == kinds
