"""Text out of token ids: whole characters only, the same text however it is cut, stop strings."""

import itertools
from collections.abc import Callable

import pytest
from glimmer.frontend.text.detokenize import StopStrings, TextOptions, TextStream, Vocabulary
from glimmer.frontend.text.tokenizer import Tokenizer
from glimmer.shared.messages import TokenLogprob
from hypothesis import given
from hypothesis import strategies as st

PLENTY = 10**6


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """`data` in pieces; the numbers say where, modulo its length."""
    places = sorted({0, len(data), *(a % (len(data) + 1) for a in at)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def stream_of(pieces: list[bytes], **options: object) -> TextStream:
    """A stream whose token ids are the numbers of the pieces."""
    vocabulary = Vocabulary(pieces, frozenset(), {})
    return TextStream(vocabulary, TextOptions(**options), PLENTY)  # type: ignore[arg-type]


def add(stream: TextStream, ids: list[int]) -> str:
    """The text that these tokens release."""
    stream.add(ids)
    return stream.take()[0]


def finish(stream: TextStream) -> str:
    """The text that is released at the end."""
    stream.close("stop")
    return stream.take()[0]


TEXTS = st.text(
    alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("a👍🏽é漢\u200d🧑‍🚀"))
)
CUTS = st.lists(st.integers(0, 10_000), max_size=30)


@given(TEXTS, CUTS)
def test_any_split_gives_the_same_text_and_never_half_a_character(text: str, at: list[int]) -> None:
    pieces = cut(text.encode(), at)
    stream = stream_of(pieces)
    emitted = [add(stream, [i]) for i in range(len(pieces))] + [finish(stream)]
    assert "".join(emitted) == text
    assert sum(t.count("\ufffd") for t in emitted) == text.count("\ufffd")
    together = stream_of(pieces)
    assert add(together, list(range(len(pieces)))) == text


def test_every_byte_split_of_an_emoji_waits_for_its_last_byte() -> None:
    data = "👍".encode()
    stream = stream_of([data[:1], data[1:2], data[2:3], data[3:]])
    assert [add(stream, [i]) for i in range(4)] == ["", "", "", "👍"]


def test_an_unfinished_character_is_dropped_at_the_end() -> None:
    stream = stream_of([b"ok", "👍".encode()[:2]])
    assert add(stream, [0, 1]) + finish(stream) == "ok"


@given(ids=st.lists(st.integers(0, 559), max_size=40))
def test_random_ids_read_as_the_tokenizers_own_decoder_reads_them(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    stream = TextStream(tokenizer.vocabulary, TextOptions(), PLENTY)
    text = "".join(add(stream, [i]) for i in ids) + finish(stream)
    whole = tokenizer._backend.decode(ids, skip_special_tokens=False)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}  # bytes of a character that never ended
    skipping = TextStream(tokenizer.vocabulary, TextOptions(skip_special_tokens=True), PLENTY)
    text = add(skipping, ids) + finish(skipping)
    assert tokenizer._backend.decode(ids, skip_special_tokens=True).startswith(text)


def first_match(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(start, end) of the string that is complete first; of several at one end, the longest."""
    found = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
    if not found:
        return None
    end, negative_length = min(found)
    return end + negative_length, end


@given(
    st.text(alphabet="ab<", max_size=40),
    st.lists(st.text(alphabet="ab<", min_size=1, max_size=6), min_size=1, max_size=4),
    CUTS,
)
def test_stop_strings_are_found_across_any_token_boundary(
    text: str, stops: list[str], at: list[int]
) -> None:
    pieces = cut(text.encode(), at)
    match = first_match(text, stops)
    expected = text if match is None else text[: match[0]]
    stream, emitted = stream_of(pieces, stop_strings=tuple(stops)), ""
    for i in range(len(pieces)):
        emitted += add(stream, [i])
        assert expected.startswith(emitted), "text was sent that a stop string would take back"
    emitted += finish(stream)
    assert emitted == expected
    assert stream.finish_reason == (None if match is None else "stop")
    assert stream.must_abort == (match is not None)
    kept = stream_of(pieces, stop_strings=tuple(stops), keep_stop=True)
    whole = "".join(add(kept, [i]) for i in range(len(pieces)))
    assert text.startswith(whole)
    assert kept.finish_reason == stream.finish_reason
    if match is not None:
        assert len(whole) >= match[1]
        assert len(whole) - len(pieces[kept.num_tokens - 1]) < match[1], "ends with that token"


def test_only_the_possible_beginning_of_a_stop_string_waits() -> None:
    stream = stream_of([b"one <", b"end", b"ing ", b"<end>", b"more"], stop_strings=("<end>",))
    assert [add(stream, [i]) for i in range(5)] == ["one ", "", "<ending ", "", ""]
    assert stream.num_tokens == 4
    assert stream.finish_reason == "stop"


def test_stop_strings_cost_the_same_per_character_whatever_the_text() -> None:
    stops = StopStrings(["a" * 1000 + "b", "a" * 999 + "c"])
    for _ in range(50):
        assert stops.feed("a" * 1000) == 0
    assert stops.num_partial == 1000
    assert stops.feed("b") == 1001


def test_stop_strings_are_not_looked_for_before_min_new_tokens() -> None:
    options = {"stop_strings": ("x",), "min_new_tokens": 3}
    stream = stream_of([b"x", b"x", b"x"], **options)
    assert [add(stream, [i]) for i in range(3)] == ["x", "x", ""]
    assert stream.finish_reason == "stop"


def test_a_stop_token_ends_without_text_and_without_abort() -> None:
    options = {"stop_token_ids": frozenset({1}), "hidden_ids": frozenset({1})}
    stream = stream_of([b"a", b"END", b"z"], **options)
    assert add(stream, [0, 1, 2]) == "a"
    assert (stream.num_tokens, stream.finish_reason, stream.must_abort) == (2, "stop", False)


def test_length_ends_with_the_last_token_and_releases_held_text() -> None:
    vocabulary = Vocabulary([b"a<"], frozenset(), {})
    stream = TextStream(vocabulary, TextOptions(stop_strings=("<x",)), max_new_tokens=2)
    assert add(stream, [0]) == "a"
    assert add(stream, [0, 0]) == "<a<"
    assert (stream.num_tokens, stream.finish_reason) == (2, "length")


def test_id_sequences_stop_after_their_last_token_and_stay_in_the_text() -> None:
    stream = stream_of([b"a", b"b", b"c"], stop_id_sequences=((0, 1), (2,)), keep_stop=True)
    assert add(stream, [1, 1, 0, 1, 2]) == "bbab"
    assert stream.must_abort
    other = stream_of([b"a", b"b", b"c"], stop_id_sequences=((0, 1), (2,)), keep_stop=True)
    assert add(other, [1, 2, 0]) == "bc"


@pytest.mark.parametrize(("spaces", "expected"), [(True, "a <x> <y> b c"), (False, "a<x><y>b c")])
def test_spaces_between_special_tokens(spaces: bool, expected: str) -> None:
    vocabulary = Vocabulary([b"a", b"<x>", b"<y>", b"b", b" c"], frozenset(), {"<x>": 1, "<y>": 2})
    options = TextOptions(add_spaces_between_special_tokens=spaces)
    stream = TextStream(vocabulary, options, PLENTY)
    assert "".join(add(stream, [i]) for i in range(5)) == expected


def test_pieces_wait_for_their_text_and_vanish_with_a_stop_string() -> None:
    tokens = [b"ab", b"c<", b"en", b"d>"]
    entries = [TokenLogprob(i, -float(i), 1, []) for i in range(4)]
    stream = stream_of(tokens, stop_strings=("<end>",), record_tokens=True)
    taken = []
    for i in range(4):
        stream.add([i], [entries[i]])
        taken.append([(p.token_id, p.text, p.offset) for p in stream.take()[1]])
    assert taken == [[(0, "ab", 0)], [(1, "c<", 2)], [], []]


def test_vocabulary_text_of_a_byte_is_replaced(text_ids: Callable[[str], list[int]]) -> None:
    vocabulary = Vocabulary([b"\xf0\x9f"], frozenset(), {})
    assert vocabulary.text(0) == "\ufffd"
