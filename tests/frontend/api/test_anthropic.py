"""Anthropic's routes, read by the official client: blocks, events, counts and errors."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import anthropic
import pytest

IDS = Callable[[str], list[int]]
PATH = "/v1/messages"
HELLO: dict[str, Any] = {
    "model": "m",
    "max_tokens": 200,
    "messages": [{"role": "user", "content": "Hello"}],
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}}
TOOLS = [
    {"name": "weather", "description": "d", "input_schema": SCHEMA, "cache_control": {"type": "x"}},
    {"name": "noop", "input_schema": {"type": "object"}},
]
THINKING = {"type": "enabled", "budget_tokens": 1024}
CALL = (
    '<tool_call>weather<arg_key>city</arg_key><arg_value>Os"lo\n</arg_value>'
    "<arg_key>n</arg_key><arg_value>3</arg_value></tool_call>"
)
REPLY = f"so</think>Look: {CALL}<tool_call>noop</tool_call>"


@pytest.fixture
async def sdk(server: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    client = anthropic.AsyncAnthropic(base_url=server.url, api_key="ignored", max_retries=0)
    yield client
    await client.close()


@pytest.fixture
def acting(server: Any, text_ids: IDS) -> Any:
    """A model that thinks, speaks and calls two tools."""
    server.engine.output_ids = [*text_ids(REPLY), 533]
    return server


async def test_plain_text(server: Any, sdk: anthropic.AsyncAnthropic) -> None:
    message = await sdk.messages.create(**HELLO)
    assert re.fullmatch("msg_[0-9a-f]{24}", message.id)
    assert (message.type, message.role, message.model) == ("message", "assistant", "m")
    [block] = message.content
    assert block.type == "text"
    assert block.text == "the answer to the question"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    [submit] = server.engine.submits
    assert usage.cache_read_input_tokens == 3
    assert usage.input_tokens == len(submit.prompt_ids) - 3
    assert (usage.output_tokens, usage.cache_creation_input_tokens) == (10, 0)
    assert server.frontend.tokenizer.decode(submit.prompt_ids).endswith("<|assistant|></think>")


async def test_thinking_and_tool_use(acting: Any, sdk: anthropic.AsyncAnthropic) -> None:
    message = await sdk.messages.create(**HELLO, tools=TOOLS, thinking=THINKING)
    thinking, text, weather, noop = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "so")
    assert len(thinking.signature) == 64
    assert (text.type, text.text) == ("text", "Look: ")
    assert (weather.type, weather.name) == ("tool_use", "weather")
    assert weather.input == {"city": 'Os"lo\n', "n": 3}
    assert re.fullmatch("toolu_[0-9a-f]{24}", weather.id)
    assert (noop.name, noop.input) == ("noop", {})
    assert message.stop_reason == "tool_use"
    [submit] = acting.engine.submits
    assert acting.frontend.tokenizer.decode(submit.prompt_ids).endswith("<|assistant|><think>")


@pytest.mark.parametrize("per_message", [1, 3, 1000])
async def test_a_stream_adds_up_to_the_whole_message(
    acting: Any, sdk: anthropic.AsyncAnthropic, per_message: int
) -> None:
    whole = await sdk.messages.create(**HELLO, tools=TOOLS, thinking=THINKING)
    acting.engine.tokens_per_message = per_message
    async with sdk.messages.stream(**HELLO, tools=TOOLS, thinking=THINKING) as stream:
        streamed = await stream.get_final_message()

    def content(message: Any) -> list[Any]:
        return [{**block.model_dump(), "id": "", "parsed_output": 0} for block in message.content]

    assert content(streamed) == content(whole)
    assert streamed.stop_reason == whole.stop_reason
    assert streamed.usage.model_dump() == whole.usage.model_dump()


async def test_text_after_a_call_stays_there(
    server: Any, sdk: anthropic.AsyncAnthropic, text_ids: IDS
) -> None:
    server.engine.output_ids = [*text_ids("<tool_call>noop</tool_call>and then"), 533]
    message = await sdk.messages.create(**HELLO, tools=TOOLS)
    assert [block.type for block in message.content] == ["tool_use", "text"]
    async with sdk.messages.stream(**HELLO, tools=TOOLS) as stream:
        streamed = await stream.get_final_message()
    assert [block.type for block in streamed.content] == ["tool_use", "text"]
    assert streamed.content[1].text == message.content[1].text == "and then"


async def test_the_events_in_order(acting: Any) -> None:
    acting.engine.tokens_per_message = 1000
    body = {**HELLO, "tools": TOOLS, "thinking": THINKING, "stream": True}
    data = (await acting.stream(PATH, body)).decode()
    events = [block.split("\n") for block in data.removesuffix("\n\n").split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    bodies = [json.loads(line.removeprefix("data: ")) for _, line in events]
    assert [body["type"] for body in bodies] == names
    steps = [
        (body["type"], body.get("index"), body.get("delta", {}).get("type")) for body in bodies
    ]
    block = "content_block_delta"
    assert steps == [
        ("message_start", None, None),
        ("ping", None, None),
        ("content_block_start", 0, None),
        (block, 0, "thinking_delta"),
        (block, 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        (block, 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, None),
        (block, 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("content_block_start", 3, None),
        (block, 3, "input_json_delta"),
        ("content_block_stop", 3, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    start = bodies[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"]["output_tokens"] == 0
    assert start["usage"]["input_tokens"] == len(acting.engine.submits[0].prompt_ids)
    assert bodies[2]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert bodies[9]["content_block"]["input"] == {}
    assert bodies[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


async def test_why_it_stopped(server: Any, sdk: anthropic.AsyncAnthropic, text_ids: IDS) -> None:
    message = await sdk.messages.create(**HELLO, stop_sequences=["zz", "er to"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "er to")
    assert message.content[0].text == "the answ"
    async with sdk.messages.stream(**HELLO, stop_sequences=["er to"]) as stream:
        streamed = await stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", "er to")
    short = await sdk.messages.create(**{**HELLO, "max_tokens": 2})
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 2)
    server.engine.output_ids = text_ids("<tool_call>weather<arg_key>city</arg_key><arg_value>O")
    cut = await sdk.messages.create(**HELLO, tools=TOOLS)
    assert (cut.stop_reason, cut.content[0].type) == ("max_tokens", "tool_use")
    assert cut.content[0].input == {}


async def test_omitted_thinking_keeps_its_block(acting: Any, sdk: anthropic.AsyncAnthropic) -> None:
    wish = {"type": "adaptive", "display": "omitted"}
    message = await sdk.messages.create(**HELLO, thinking=wish, tools=TOOLS)
    assert (message.content[0].type, message.content[0].thinking) == ("thinking", "")
    assert message.content[0].signature
    async with sdk.messages.stream(**HELLO, thinking=wish, tools=TOOLS) as stream:
        streamed = await stream.get_final_message()
    assert streamed.content[0] == message.content[0]


async def test_a_tool_loop(acting: Any, sdk: anthropic.AsyncAnthropic, text_ids: IDS) -> None:
    first = await sdk.messages.create(**HELLO, tools=TOOLS, thinking=THINKING)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": f"result {n}"}
        for n, block in enumerate(b for b in first.content if b.type == "tool_use")
    ]
    conversation = [
        *HELLO["messages"],
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": results},
    ]
    acting.engine.output_ids = [*text_ids("done</think>It rains."), 531]
    second = await sdk.messages.create(
        **{**HELLO, "messages": conversation}, tools=TOOLS, thinking=THINKING
    )
    assert second.content[-1].text == "It rains."
    prompt = acting.frontend.tokenizer.decode(acting.engine.submits[-1].prompt_ids)
    assert prompt.endswith(
        "<|assistant|><think>so</think>Look:<tool_call>weather<arg_key>city</arg_key>"
        '<arg_value>Os"lo\n</arg_value><arg_key>n</arg_key><arg_value>3</arg_value></tool_call>'
        "<tool_call>noop</tool_call><|observation|><tool_response>result 0</tool_response>"
        "<tool_response>result 1</tool_response><|assistant|><think>"
    )


async def test_tokens_are_counted_as_they_are_run(
    server: Any, sdk: anthropic.AsyncAnthropic
) -> None:
    prompt = {"model": "m", "messages": HELLO["messages"], "tools": TOOLS, "system": "be brief"}
    count = await sdk.messages.count_tokens(**prompt)
    await sdk.messages.create(**prompt, max_tokens=1)
    [submit] = server.engine.submits
    assert count.input_tokens == len(submit.prompt_ids)


async def test_refusals_have_anthropics_envelope(
    server: Any, sdk: anthropic.AsyncAnthropic
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        await sdk.messages.create(**{**HELLO, "max_tokens": 0})
    body = caught.value.body
    assert isinstance(body, dict)
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith("max_tokens")
    assert body["request_id"] == caught.value.request_id
    status, reply = await server.post("/v1/messages/nothing", {})
    assert (status, reply["error"]["type"]) == (404, "not_found_error")
    server.frontend.client.state.draining = True
    status, reply = await server.post(PATH, HELLO)
    assert (status, reply["error"]["type"]) == (503, "overloaded_error")


async def test_a_large_body_is_refused_in_anthropics_words(start: Any) -> None:
    server = await start(max_body_mb=0.01)
    status, reply = await server.post(PATH, {**HELLO, "system": "x" * 20_000})
    assert (status, reply["error"]["type"]) == (413, "request_too_large")


async def test_a_stream_that_breaks_ends_with_an_error_event(
    server: Any, sdk: anthropic.AsyncAnthropic
) -> None:
    server.engine.manual = True

    opening = asyncio.create_task(sdk.messages.create(**HELLO, stream=True))
    submit = (await server.engine.submitted())[0]
    server.engine.tokens(submit, [275])
    stream = await opening
    server.engine.lose("gone")
    with pytest.raises(anthropic.APIStatusError, match="the engine was lost: gone") as caught:
        _ = [event async for event in stream]
    assert caught.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]
    assert server.engine.aborted_ids == []


async def test_clients_that_ask_for_models_in_anthropics_way(
    server: Any, sdk: anthropic.AsyncAnthropic
) -> None:
    models = [model async for model in await sdk.models.list()]
    assert [(model.id, model.type, model.display_name) for model in models] == [
        ("tiny", "model", "tiny")
    ]
    assert (await sdk.models.retrieve("tiny")).id == "tiny"


async def test_a_long_wait_is_a_start_and_pings(server: Any) -> None:
    server.engine.manual = True
    posting = server.session.post(server.url + PATH, json={**HELLO, "stream": True})
    request = asyncio.create_task(posting.__aenter__())
    submit = (await server.engine.submitted())[0]
    generation = next(iter(server.frontend.client._generations.values()))
    await server.settle(lambda: generation._waiter is not None)
    generation.wake()
    reply = await request
    names = [await reply.content.readuntil(b"\n\n") for _ in range(3)]
    assert [name.split(b"\n")[0] for name in names] == [
        b"event: message_start",
        b"event: ping",
        b"event: ping",
    ]
    server.engine.tokens(submit, [275])
    server.engine.finish(submit, "abort", 1)
    rest = await reply.read()
    assert b'"stop_reason":"max_tokens"' in rest
    assert rest.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
