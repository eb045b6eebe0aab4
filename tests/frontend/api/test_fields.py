"""Harmless values are taken, wishes are fulfilled or reported."""

from typing import Any

import pytest

from ..conftest import Harness, Start

pytestmark = pytest.mark.asyncio(loop_scope="module")
Body = dict[str, Any]
CHAT: Body = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 3}
RESPONSES: Body = {"input": "go", "max_output_tokens": 3}
CHATS = [("/v1/chat/completions", CHAT), ("/v1/messages", CHAT), ("/v1/responses", RESPONSES)]
PROMPTS = [("/v1/completions", {"prompt": "x", "max_tokens": 3}), ("/generate", {"inputs": "x"})]


def prompt(server: Harness) -> str:
    return server.frontend.tokenizer.decode(server.engine.submits[-1].prompt_ids)


@pytest.mark.parametrize(
    ("path", "fields", "end"),
    [
        ("/v1/responses", {"truncation": "auto"}, "<think>"),
        ("/v1/chat/completions", {"thinking": {"type": "adaptive"}}, "<think>"),
        ("/v1/chat/completions", {"thinking": {"type": "disabled"}}, "</think>"),
        ("/v1/chat/completions", {"enable_thinking": False}, "</think>"),
        ("/v1/responses", {"enable_thinking": False}, "</think>"),
        ("/v1/messages", {"enable_thinking": True}, "<think>"),
        ("/v1/messages", {"thinking": {"type": "adaptive", "display": "full"}}, "<think>"),
    ],
)
async def test_values_that_clients_send(
    module_server: Harness, path: str, fields: Body, end: str
) -> None:
    body = dict(CHATS)[path]
    status, reply = await module_server.post(path, {**body, **fields})
    assert status == 200, reply
    assert prompt(module_server).endswith(f"<|assistant|>{end}")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [*CHATS, *PROMPTS])
async def test_unknown_fields_are_named_in_a_header(
    module_server: Harness, path: str, body: Body, stream: bool
) -> None:
    if path == "/generate":
        path = "/generate_stream" if stream else path
    elif stream:
        body = {**body, "stream": True}
    more = {"wish": 1, "a\r\nb": 2, "é": 3, "prefix": 4}
    url = module_server.url + path
    async with module_server.session.post(url, json={**body, **more}) as reply:
        assert reply.status == 200
        assert reply.headers["X-Ignored-Fields"] == "ab, prefix, wish"
        await reply.read()
    async with module_server.session.post(url, json=body) as reply:
        assert "X-Ignored-Fields" not in reply.headers
        await reply.read()


async def test_unknown_fields_of_a_large_body(module_server: Harness) -> None:
    body = {**PROMPTS[0][1], "wish": "x" * 100_000}
    async with module_server.session.post(
        f"{module_server.url}/v1/completions", json=body
    ) as reply:
        assert (reply.status, reply.headers["X-Ignored-Fields"]) == (200, "wish")


@pytest.mark.asyncio(loop_scope="function")
async def test_strict_fields_are_refused(start: Start) -> None:
    server = await start(strict_fields=True)
    for path, body in (*CHATS, *PROMPTS):
        status, reply = await server.post(path, {**body, "wish": 1})
        assert (status, "wish: has no effect" in str(reply)) == (400, True), path
        assert (await server.post(path, body))[0] == 200
    status, reply = await server.post(CHATS[0][0], {**CHAT, "tools": [{"type": "search"}]})
    assert (status, reply["error"]["param"]) == (400, "tools.search")


async def test_a_reply_goes_on_from_the_last_message_of_the_assistant(
    module_server: Harness,
) -> None:
    blocks = [{"type": "text", "text": "I am<|user|>"}]
    for content, text in (("I am", "I am"), (blocks, "I am<|user|>")):
        messages = [*CHAT["messages"], {"role": "assistant", "content": content}]
        body = {**CHAT, "messages": messages, "thinking": {"type": "enabled"}}
        status, reply = await module_server.post("/v1/messages", body)
        assert status == 200, reply
        ids = module_server.engine.submits[-1].prompt_ids
        assert prompt(module_server).endswith(f"go<|assistant|></think>{text}")
        assert ids.count(module_server.frontend.tokenizer.vocabulary.added_ids["<|user|>"]) == 1
        _, count = await module_server.post("/v1/messages/count_tokens", body)
        assert count == {"input_tokens": len(ids)}


@pytest.mark.asyncio(loop_scope="function")
@pytest.mark.parametrize("default", ["both", "reasoning", "reasoning_content"])
async def test_the_key_of_the_reasoning_can_be_chosen(start: Start, default: str) -> None:
    server = await start(reasoning_parser="glm45", reasoning_field=default)
    both = ["reasoning", "reasoning_content"]
    for wish in (None, "both", "reasoning", "reasoning_content"):
        expected = both if (wish or default) == "both" else [wish or default]
        body = {**CHAT, "reasoning_field": wish}
        _, reply = await server.post("/v1/chat/completions", body)
        message = reply["choices"][0]["message"]
        assert sorted(set(message) & set(both)) == expected
        events = await server.events("/v1/chat/completions", {**body, "stream": True})
        deltas = [choice["delta"] for e in events[:-1] for choice in e["choices"]]
        found = {key for delta in deltas for key in delta} & set(both)
        assert sorted(found) == expected


async def test_a_list_of_prompts_streams_with_an_index_per_choice(module_server: Harness) -> None:
    body = {"prompt": ["a", "b b"], "max_tokens": 20, "temperature": 0}
    whole = (await module_server.post("/v1/completions", body))[1]
    for more in ({}, {"echo": True}, {"n": 2, "temperature": 1}, {"prompt": [[1, 2], [3]]}):
        whole = (await module_server.post("/v1/completions", {**body, **more}))[1]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        events = await module_server.events("/v1/completions", {**body, **more, **options})
        assert events.pop() == "[DONE]"
        assert events.pop()["usage"] == whole["usage"]
        texts: dict[int, str] = {}
        for event in events:
            for choice in event["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        assert texts == {choice["index"]: choice["text"] for choice in whole["choices"]}
