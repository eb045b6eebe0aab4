"""A prompt that is too long is refused in the words that agents look for, in tokens."""

import json
import re
from typing import Any

import pytest

from ..conftest import MAX_TOTAL, Harness

pytestmark = pytest.mark.asyncio(loop_scope="module")
FIELDS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/messages": "messages",
    "/generate": "inputs",
}


def body_of(route: str, text: str, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    content = messages if FIELDS[route] == "messages" else text
    limit = {} if route in ("/v1/responses", "/generate") else {"max_tokens": 5}
    return {FIELDS[route]: content, **limit, "stream": stream}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", FIELDS)
@pytest.mark.parametrize("length", ["just", "far", "cut"])
async def test_both_numbers_are_tokens(
    module_server: Harness, route: str, stream: bool, length: str
) -> None:
    text = {"just": "x" * MAX_TOTAL, "far": "1 " * 1000, "cut": "word " * 10_000}[length]
    status, reply = await module_server.post(route, body_of(route, text, stream))
    assert status == 400
    error = reply["error"]
    if route == "/v1/messages":
        assert error["type"] == "invalid_request_error"
        pattern = r"prompt is too long: (\d+) tokens > (\d+) maximum"
        match = re.match(pattern, error["message"])
        assert match is not None, error
        num_tokens, limit = map(int, match.groups())
        assert limit == MAX_TOTAL - 1
    else:
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == FIELDS[route]
        pattern = r"maximum context length is (\d+) tokens.* (\d+) tokens"
        match = re.search(pattern, error["message"])
        assert match is not None, error
        limit, num_tokens = map(int, match.groups())
        assert limit == MAX_TOTAL
    assert num_tokens > MAX_TOTAL if length != "just" else num_tokens >= MAX_TOTAL
    if length == "cut":
        assert "estimated from 5" in error["message"]


async def test_counting_says_it_too(module_server: Harness) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 10_000}]}
    status, reply = await module_server.post("/v1/messages/count_tokens", body)
    assert status == 400
    assert re.match(r"prompt is too long: 12500 tokens > 511 maximum", reply["error"]["message"])
    body["messages"][0]["content"] = "1 " * 600
    status, reply = await module_server.post("/v1/messages/count_tokens", body)
    assert (status, reply["input_tokens"] > MAX_TOTAL) == (200, True), "counting needs no room"


async def test_litellm_and_others_find_their_words(module_server: Harness) -> None:
    body = body_of("/v1/chat/completions", "1 " * 1000, False)
    _, reply = await module_server.post("/v1/chat/completions", body)
    assert "this model's maximum context length is" in json.dumps(reply).lower()
