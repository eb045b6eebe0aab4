"""The JSON of OpenAI's streams."""

import json
from typing import Any

from glimmer.frontend.api.openai import DONE, ChunkWriter, usage_json
from glimmer.frontend.engine.job import Usage
from glimmer.frontend.wire.schema import OpenAiBody, StreamOptions


class Job:
    """A job of which the counts are known."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    def usage(self) -> Usage:
        return self._usage


def make_writer(body: OpenAiBody, usage: Usage) -> ChunkWriter:
    job: Any = Job(usage)
    return ChunkWriter("text_completion", "id-1", body, job)


def parse(data: bytes) -> dict:
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    return json.loads(data[6:])


def test_a_chunk_and_the_end() -> None:
    chunks = make_writer(OpenAiBody(model='m"'), Usage(1, 2, 0, 0))
    event = parse(chunks.chunk(2, b'"text":"x"'))
    assert event["choices"] == [{"index": 2, "text": "x", "logprobs": None, "finish_reason": None}]
    assert (event["id"], event["object"], event["model"]) == ("id-1", "text_completion", 'm"')
    assert "usage" not in event
    last = parse(chunks.chunk(0, b'"text":""', {"a": [1]}, "stop"))
    assert last["choices"][0]["logprobs"] == {"a": [1]}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert chunks.end() == DONE


def test_usage_is_sent_only_if_asked_for() -> None:
    body = OpenAiBody(stream_options=StreamOptions(include_usage=True))
    chunks = make_writer(body, Usage(3, 4, 1, 0))
    assert parse(chunks.chunk(0, b'"text":"x"'))["usage"] is None
    usage = usage_json(Usage(3, 4, 1, 0))
    end = chunks.end()
    assert end.endswith(DONE)
    event = parse(end.removesuffix(DONE))
    assert (event["choices"], event["usage"]) == ([], usage)
    assert (usage["total_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (7, 1)
