"""What references lead to, and schemas that are put together of others; refused or left out."""

from typing import Any

import pytest
from glimmer.frontend.grammar.document import Document
from glimmer.frontend.grammar.problems import SourceError
from glimmer.frontend.grammar.widen import widen

ROOT: Any = {
    "$defs": {
        "a/b~c": {"type": "null"},
        "named": {"title": "t", "properties": {"n": {"type": "string"}}, "required": ["n"]},
        "list": [{"const": 1}],
        "loop": {"$ref": "#/$defs/loop"},
    },
    "title": "root",
}


def test_references_are_followed() -> None:
    document = Document(ROOT)
    assert document.resolve("#", "#") is ROOT
    assert document.resolve("#/$defs/a~1b~0c", "#") == {"type": "null"}
    assert document.resolve("#/$defs/list/0", "#") == {"const": 1}
    both = document.inlined({"$ref": "#/$defs/named", "maxProperties": 3}, "#")
    assert both == {**ROOT["$defs"]["named"], "maxProperties": 3}


def test_parts_are_put_together_what_stands_outside_first() -> None:
    document = Document(ROOT)
    outside = {"properties": {"k": {"const": 1}}, "required": ["k"]}
    parts = [{"$ref": "#/$defs/named"}, False, {"type": "null"}]
    whole = document.all_of({**outside, "allOf": parts[:1]}, "#")
    assert isinstance(whole, dict)
    assert (list(whole["properties"]), whole["required"]) == (["k", "n"], ["k", "n"])
    found = document.branches({**outside, "anyOf": parts}, "anyOf", "#")
    assert found == {"#/anyOf/0": whole, "#/anyOf/2": {**outside, "type": "null"}}
    assert document.branches({"anyOf": parts}, "anyOf", "#")["#/anyOf/0"] is parts[0]


WRONG: dict[str, Any] = {
    "points at nothing": lambda document: document.resolve("#/nope", "#"),
    "must point into": lambda document: document.resolve(3, "#"),
    "points at no schema": lambda document: document.resolve("#/title", "#"),
    "leads back": lambda document: document.inlined({"$ref": "#/$defs/loop"}, "#"),
    "an object or a boolean": lambda document: document.inlined("text", "#"),
}


@pytest.mark.parametrize("problem", WRONG)
def test_what_is_wrong_is_refused_or_anything(problem: str) -> None:
    with pytest.raises(SourceError, match=problem):
        WRONG[problem](Document(ROOT))
    assert WRONG[problem](Document(ROOT, widen)) is True


def test_what_contradicts_itself_is_refused_or_left_out() -> None:
    parts = [{"pattern": "a"}, {"pattern": "b"}]
    with pytest.raises(SourceError, match="two different pattern"):
        Document(ROOT).all_of({"allOf": parts}, "#")
    assert Document(ROOT, widen).all_of({"allOf": parts}, "#") == {"pattern": "a"}
    with pytest.raises(SourceError, match="matches nothing"):
        Document(ROOT).branches({"anyOf": [False]}, "anyOf", "#")
    assert Document(ROOT, widen).branches({"anyOf": [False]}, "anyOf", "#") == {}
    with pytest.raises(SourceError, match="uniqueItems"):
        Document(ROOT).opened({"uniqueItems": True}, "#")
    assert Document(ROOT, widen).opened({"uniqueItems": True}, "#") == {}
