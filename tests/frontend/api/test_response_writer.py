"""Items and events from deltas, without a server."""

import json
from typing import Any

from glimmer.frontend.api.responses import ResponseWriter
from glimmer.frontend.api.responses_request import ResponsesBody, TextConfig
from glimmer.frontend.engine.job import Reply, Usage
from glimmer.frontend.parsers.deltas import CallArguments, CallStart, Content, Delta, Reasoning
from glimmer.frontend.text.detokenize import DecodedToken, Vocabulary
from glimmer.shared.errors import EngineError
from glimmer.shared.messages import Finished, TokenLogprob

USAGE = Usage(7, 5, 2, 1)
VOCABULARY = Vocabulary([b"a", b"b"], frozenset(), {})


class Stream:
    """A stream whose output is given."""

    def __init__(self, deltas: list[Delta], tokens: list[DecodedToken], reason: str | None) -> None:
        self.finish_reason = reason
        self.parser = self  # whose calls are counted
        self.num_calls = sum(isinstance(delta, CallStart) for delta in deltas)
        self._output = deltas, tokens

    def take(self) -> Any:
        return self._output


def output(
    deltas: list[Delta], tokens: list[DecodedToken] | None = None, reason: str | None = None
) -> Any:
    """A reply with this new output."""
    stream: Any = Stream(deltas, tokens or [], reason)
    return Reply(0, stream, finished=Finished(1, reason) if reason else None)


def make_writer(body: ResponsesBody) -> ResponseWriter:
    return ResponseWriter(body, VOCABULARY, lambda: USAGE, {})


def written(events: bytes) -> list[dict[str, Any]]:
    return [json.loads(e.split(b"\ndata: ")[1]) for e in events.split(b"\n\n") if e]


def test_every_item_is_announced_filled_and_repeated() -> None:
    writer = make_writer(ResponsesBody("x"))
    outputs = [
        output([Reasoning("r"), Content("a")]),
        output([Content("b"), CallStart(0, "call_1", "f")]),
        output([CallArguments(0, "{}"), Content("c")], reason="stop"),
    ]
    events = written(b"".join(map(writer.add, outputs)) + writer.end())
    assert [item["type"] for item in writer.response["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "message",
    ]
    added = [e["item"]["id"] for e in events if e["type"] == "response.output_item.added"]
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert [item["id"] for item in done] == added
    assert done == writer.response["output"]
    assert done[1]["content"][0]["text"] == "ab"
    assert done[2]["arguments"] == "{}"
    assert writer.response["status"] == "completed"
    assert writer.response["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 12,
    }


def test_logprobs_of_text_that_went_out_before_are_not_lost() -> None:
    writer = make_writer(ResponsesBody("x", top_logprobs=0))
    token = DecodedToken(1, "b", 0, TokenLogprob(1, -0.5, 1, []))
    events = written(writer.add(output([Content("b")])))
    events += written(writer.add(output([], [token], "stop")))
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [(e["delta"], len(e["logprobs"])) for e in deltas] == [("b", 0), ("", 1)]
    writer.end()
    [entry] = writer.response["output"][0]["content"][0]["logprobs"]
    assert (entry["token"], entry["logprob"]) == ("b", -0.5)


def test_a_failure_closes_the_open_item() -> None:
    writer = make_writer(ResponsesBody("x"))
    writer.add(output([Content("a")]))
    events = written(writer.fail(EngineError("broken")))
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert response["error"] == {"code": "server_error", "message": "broken"}
    assert [item["status"] for item in response["output"]] == ["incomplete"]


def test_what_was_asked_for_is_repeated() -> None:
    body = ResponsesBody(
        "x", model="m", text=TextConfig(format={"type": "json_object"}), store=True
    )
    response = make_writer(body).response
    assert response["text"] == {"format": {"type": "json_object"}}
    assert (response["store"], response["tool_choice"], response["tools"]) == (False, "auto", [])
    assert (response["metadata"], response["output"]) == ({}, [])
