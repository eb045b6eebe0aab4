"""Streams of several servers, whole, cut anywhere, broken: when tokens came and how it ended."""

import pytest
from glimmer.deploy.bench.stream import StreamReader, message_of

DONE = b"data: [DONE]\n\n"


def read(*parts: bytes, keep_text: bool = True) -> StreamReader:
    """Piece number i arrives at second i."""
    reader = StreamReader(keep_text)
    for i, part in enumerate(parts):
        reader.feed(part, float(i))
    reader.close(float(len(parts)))
    return reader


def completion(text: str, reason: str = "null") -> bytes:
    choice = f'{{"index": 0, "text": "{text}", "logprobs": null, "finish_reason": {reason}}}'
    return f'data: {{"choices": [{choice}], "usage": null}}\n\n'.encode()


def chat(delta: str, reason: str = "null") -> bytes:
    return f'data: {{"choices": [{{"delta": {delta}, "finish_reason": {reason}}}]}}\n\n'.encode()


def usage(output: int) -> bytes:
    counts = f'{{"prompt_tokens": 9, "completion_tokens": {output}}}'
    return f'data: {{"choices": [], "usage": {counts}}}\n\n'.encode()


GLIMMER = (completion("a"), completion("b c"), completion("", '"length"') + usage(3) + DONE)


def test_an_ending_chunk_without_text_is_no_token() -> None:
    reader = read(*GLIMMER)
    assert reader.error is None
    assert reader.arrivals_s == [0, 1]
    assert reader.last_s == 2
    assert (reader.prompt_tokens, reader.output_tokens) == (9, 3)
    assert "".join(reader.texts) == "ab c"


def test_a_last_token_may_come_with_the_end() -> None:
    reader = read(completion("a"), completion("b", '"stop"'), usage(2) + DONE)
    assert (reader.arrivals_s, reader.last_s, reader.output_tokens) == ([0, 1], 1, 2)


def test_half_a_character_is_a_token_without_text() -> None:
    assert read(completion(""), completion("é", '"stop"'), DONE).arrivals_s == [0, 1]
    reader = read(chat('{"content": ""}'), chat('{"content": "x"}', '"stop"'), DONE)
    assert reader.arrivals_s == [0, 1]


@pytest.mark.parametrize(
    "delta",
    [
        '{"content": "x"}',
        '{"role": "assistant", "content": "x"}',
        '{"reasoning_content": "x"}',
        '{"reasoning": "x", "reasoning_content": "x"}',
        '{"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}',
    ],
)
def test_all_that_chat_generates_counts_and_the_role_does_not(delta: str) -> None:
    first = chat('{"role": "assistant", "content": ""}')
    reader = read(first, chat(delta), chat("{}", '"tool_calls"') + DONE)
    assert (reader.error, reader.arrivals_s) == (None, [1])
    assert "".join(reader.texts) in ("x", "")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_events_may_be_cut_anywhere(size: int) -> None:
    data = b": keep-alive\n\n" + b"event: x\r\n" + b"".join(GLIMMER).replace(b"\n", b"\r\n")
    reader = read(*(data[i : i + size] for i in range(0, len(data), size)))
    assert reader.error is None
    assert (len(reader.arrivals_s), reader.output_tokens) == (2, 3)


def test_several_events_may_arrive_together() -> None:
    assert read(b"".join(GLIMMER)).arrivals_s == [0, 0]


def test_the_last_line_may_lack_its_end_and_done_may_be_missing() -> None:
    assert read(completion("a"), DONE.rstrip()).error is None
    assert read(completion("a", '"stop"')).error is None


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((completion("a"),), "the stream broke off"),
        ((), "the stream broke off"),
        ((completion("", '"stop"'), DONE), "a stream without tokens"),
        ((DONE,), "a stream without tokens"),
        ((completion("a"), completion("", '"abort"'), DONE), "finish_reason abort"),
        ((completion("a"), b'data: {"error": {"message": "lost"}}\n\n', DONE), "lost"),
        ((b'data: {"object": "error", "message": "full", "code": 400}\n\n', DONE), "full"),
        ((b"data: {]\n\n", DONE), "a chunk that is not understood"),
        ((b'data: {"choices": 3}\n\n', DONE), "a chunk that is not understood"),
        ((b"data: \xff\n\n", DONE), "a chunk that is not understood"),
    ],
)
def test_what_is_not_a_whole_reply_says_why(parts: tuple[bytes, ...], words: str) -> None:
    assert words in str(read(*parts).error)


def test_tokens_that_were_only_counted_are_there_when_the_reply_ends() -> None:
    reader = read(completion("", '"length"'), usage(1) + DONE)
    assert (reader.error, reader.arrivals_s, reader.last_s) == (None, [], 0)


def test_text_is_kept_only_where_it_is_needed() -> None:
    assert read(*GLIMMER, keep_text=False).texts == []


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ({"error": {"message": "a\n b"}}, "a b"),
        ({"detail": "c"}, "c"),
        ("d", "d"),
        (None, "None"),
        ("", "an error without text"),
        ({"error": {"code": 3}}, "{'code': 3}"),
        ("x" * 999, "x" * 300),
    ],
)
def test_errors_of_every_shape_become_a_line(error: object, text: str) -> None:
    assert message_of(error) == text
