"""A problem says where it is, however deep that is."""

from glimmer.frontend.grammar.problems import SourceError


def test_a_long_place_is_shortened() -> None:
    assert str(SourceError("is wrong")) == "is wrong"
    assert str(SourceError("is wrong", "#/a")) == "#/a: is wrong"
    text = str(SourceError("is wrong", "#" + "/properties/a" * 200))
    assert len(text) < 200
    assert text.startswith("#/properties")
    assert text.endswith("/a: is wrong")
