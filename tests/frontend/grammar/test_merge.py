"""Two schemas that both must hold."""

from typing import Any

import pytest
from glimmer.frontend.grammar.merge import merge
from glimmer.frontend.grammar.problems import SourceError


@pytest.mark.parametrize(
    ("a", "b", "both"),
    [
        ({}, {"type": "null"}, {"type": "null"}),
        (True, {"type": "null"}, {"type": "null"}),
        ({"type": "null"}, True, {"type": "null"}),
        (False, {"type": "null"}, False),
        ({"minimum": 1, "maximum": 9}, {"minimum": 3, "maximum": 20}, {"minimum": 3, "maximum": 9}),
        ({"required": ["a"]}, {"required": ["b", "a"]}, {"required": ["a", "b"]}),
        ({"type": ["integer", "null"]}, {"type": "number"}, {"type": ["integer"]}),
        ({"type": "string"}, {"type": "null"}, {"type": []}),
        ({"enum": [1, 2]}, {"enum": [2, 3]}, {"enum": [2]}),
        ({"title": "a"}, {"title": "b"}, {"title": "b"}),
        (
            {"properties": {"a": {"minimum": 1}, "b": {}}},
            {"properties": {"a": {"maximum": 2}}},
            {"properties": {"a": {"minimum": 1, "maximum": 2}, "b": {}}},
        ),
        ({"items": {"type": "null"}}, {"items": False}, {"items": False}),
    ],
)
def test_merge(a: Any, b: Any, both: Any) -> None:
    assert merge(a, b, "#") == both


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"pattern": "a"}, {"pattern": "b"}),
        ({"minimum": 1}, {"minimum": "x"}),
        ({"properties": []}, {"properties": {}}),
        ({"required": 1}, {"required": []}),
        ({"const": 1}, {"const": 2}),
    ],
)
def test_what_cannot_be_merged_is_refused(a: Any, b: Any) -> None:
    with pytest.raises(SourceError, match="#/x"):
        merge(a, b, "#/x")


@pytest.mark.parametrize(
    ("a", "b", "left"),
    [
        ({"pattern": "a", "minLength": 1}, {"pattern": "b", "minLength": 2}, ("a", 2)),
        ({"pattern": "a", "minLength": 1}, {"minLength": "x"}, ("a", 1)),
    ],
)
def test_relaxed_the_first_of_two_is_left(a: Any, b: Any, left: tuple[str, int]) -> None:
    merged = merge(a, b, "#", relaxed=True)
    assert isinstance(merged, dict)
    assert (merged["pattern"], merged["minLength"]) == left


def test_relaxed_types_go_by_any_name() -> None:
    for a, b, both in (
        ("float", "number", ["number"]),
        (["dict", "none"], "object", ["object"]),
        ("any", ["str"], ["string"]),
        ("list", "dict", []),
    ):
        assert merge({"type": a}, {"type": b}, "#", relaxed=True) == {"type": both}
    inside = {"properties": {"x": {"const": 1}}}, {"properties": {"x": {"const": 2}}}
    assert merge(*inside, "#", relaxed=True) == inside[0]
