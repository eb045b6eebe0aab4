"""Items and events from deltas, without a server."""

import json
from typing import Any

from glimmer.frontend.api.responses_request import ResponsesBody, TextConfig
from glimmer.frontend.api.responses_writer import ResponseWriter
from glimmer.frontend.chat.chat import News, Usage
from glimmer.frontend.parsers.deltas import CallArguments, CallStart, Content, Reasoning
from glimmer.frontend.text.detokenize import Piece, Vocabulary
from glimmer.shared.messages import TokenLogprob

USAGE = Usage(7, 5, 2, 1)
VOCABULARY = Vocabulary([b"a", b"b"], frozenset(), {})


def written(events: Any) -> list[dict[str, Any]]:
    return [json.loads(event.split(b"\ndata: ")[1]) for event in events]


def test_every_item_is_announced_filled_and_repeated() -> None:
    writer = ResponseWriter(ResponsesBody("x"), VOCABULARY)
    news = [
        News(0, [Reasoning("r"), Content("a")], [], None),
        News(0, [Content("b"), CallStart(0, "call_1", "f")], [], None),
        News(0, [CallArguments(0, "{}"), Content("c")], [], "tool_calls"),
    ]
    events = written(event for one in news for event in writer.news(one))
    events += written(writer.end(USAGE))
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
    writer = ResponseWriter(ResponsesBody("x", top_logprobs=0), VOCABULARY)
    piece = Piece(1, "b", 0, TokenLogprob(1, -0.5, 1, []))
    events = written(writer.news(News(0, [Content("b")], [], None)))
    events += written(writer.news(News(0, [], [piece], "stop")))
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [(e["delta"], len(e["logprobs"])) for e in deltas] == [("b", 0), ("", 1)]
    list(writer.end(USAGE))
    [entry] = writer.response["output"][0]["content"][0]["logprobs"]
    assert (entry["token"], entry["logprob"]) == ("b", -0.5)


def test_a_failure_closes_the_open_item() -> None:
    writer = ResponseWriter(ResponsesBody("x"), VOCABULARY)
    list(writer.news(News(0, [Content("a")], [], None)))
    events = written(writer.fail("broken", USAGE))
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert response["error"] == {"code": "server_error", "message": "broken"}
    assert [item["status"] for item in response["output"]] == ["incomplete"]


def test_what_was_asked_for_is_repeated() -> None:
    body = ResponsesBody(
        "x", model="m", text=TextConfig(format={"type": "json_object"}), store=True
    )
    response = ResponseWriter(body, VOCABULARY).response
    assert response["text"] == {"format": {"type": "json_object"}}
    assert (response["store"], response["tool_choice"], response["tools"]) == (False, "auto", [])
    assert (response["metadata"], response["output"]) == ({}, [])
