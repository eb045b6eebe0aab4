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
