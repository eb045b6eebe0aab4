"""/v1/responses, read by the official client: items, events, and what is refused."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest

IDS = Callable[[str], list[int]]
PATH = "/v1/responses"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False},
    {"type": "function", "name": "noop"},
]
CALL = "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>"
REPLY = f"so</think>Look: {CALL}<tool_call>noop</tool_call>"


@pytest.fixture
async def sdk(server: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    yield client
    await client.close()


@pytest.fixture
def acting(server: Any, text_ids: IDS) -> Any:
    """A model that thinks, speaks and calls two tools."""
    server.engine.output_ids = [*text_ids(REPLY), 533]
    return server


def body_of(response: Any) -> dict[str, Any]:
    """What must be the same whole and streamed: all but ids and times."""
    data: dict[str, Any] = response.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in data["output"]:
        item.update(id="", call_id="")
        item.pop("parsed_arguments", None)  # the client's own
        for part in item.get("content") or []:
            part.pop("parsed", None)
    return data


async def test_a_plain_reply(server: Any, sdk: openai.AsyncOpenAI) -> None:
    server.engine.output_ids = [*server.engine.output_ids[:3], 524]
    response = await sdk.responses.create(
        model="m",
        input="Hello",
        instructions="be brief",
        max_output_tokens=50,
        reasoning={"effort": "none"},
        metadata={"a": "b"},
        store=True,
    )
    assert response.id.startswith("resp_")
    assert response.output_text == "the answer"
    assert (response.status, response.error, response.incomplete_details) == (
        "completed",
        None,
        None,
    )
    assert (response.model, response.instructions, response.metadata) == (
        "m",
        "be brief",
        {"a": "b"},
    )
    assert (response.max_output_tokens, response.truncation) == (50, "disabled")
    [submit] = server.engine.submits
    usage = response.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (len(submit.prompt_ids), 4)
    assert usage.total_tokens == usage.input_tokens + 4
    assert usage.input_tokens_details.cached_tokens == 3
    prompt = server.frontend.tokenizer.decode(submit.prompt_ids)
    assert prompt == "[gMASK]<sop><|system|>be brief<|user|>Hello<|assistant|></think>"


async def test_reasoning_text_and_calls_are_items(acting: Any, sdk: openai.AsyncOpenAI) -> None:
    response = await sdk.responses.create(model="m", input="Hello", tools=TOOLS)
    reasoning, message, weather, noop = response.output
    assert reasoning.type == "reasoning"
    assert [part.text for part in reasoning.content or []] == ["so"]
    assert message.type == "message"
    assert (message.status, message.content[0].type) == ("completed", "output_text")
    assert response.output_text == "Look: "
    assert weather.type == noop.type == "function_call"
    assert (weather.name, json.loads(weather.arguments)) == ("weather", {"city": "Oslo"})
    assert weather.call_id.startswith("call_")
    assert noop.arguments == "{}"
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert response.status == "completed"


@pytest.mark.parametrize("per_message", [1, 4, 1000])
async def test_the_stream_ends_with_the_whole_response(
    acting: Any, sdk: openai.AsyncOpenAI, per_message: int
) -> None:
    whole = await sdk.responses.create(model="m", input="Hello", tools=TOOLS)
    acting.engine.tokens_per_message = per_message
    async with sdk.responses.stream(model="m", input="Hello", tools=TOOLS) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert body_of(events[-1].response) == body_of(whole)  # type: ignore[union-attr]
    assert final.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_the_events_in_order(acting: Any) -> None:
    acting.engine.tokens_per_message = 1000
    data = (await acting.stream(PATH, {"input": "x", "tools": TOOLS, "stream": True})).decode()
    blocks = [block.split("\n") for block in data.removesuffix("\n\n").split("\n\n")]
    bodies = [json.loads(line.removeprefix("data: ")) for _, line in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [b["type"] for b in bodies]
    steps = [(b["type"].removeprefix("response."), b.get("output_index")) for b in bodies]
    call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]

    def filled(delta: str) -> list[str]:
        part = ["content_part.added", f"{delta}.delta", f"{delta}.done", "content_part.done"]
        return ["output_item.added", *part, "output_item.done"]

    assert steps == [
        ("created", None),
        ("in_progress", None),
        *((name, 0) for name in filled("reasoning_text")),
        *((name, 1) for name in filled("output_text")),
        *((name, 2) for name in call),
        *((name, 3) for name in call),
        ("completed", None),
    ]
    assert bodies[0]["response"]["status"] == "in_progress"
    assert bodies[2]["item"]["status"] == "in_progress"
    assert bodies[7]["item"]["content"] == [{"type": "reasoning_text", "text": "so"}]
    done = bodies[-2]["item"]
    assert (done["name"], done["arguments"], done["status"]) == ("noop", "{}", "completed")


async def test_a_cut_off_reply_is_incomplete(server: Any, sdk: openai.AsyncOpenAI) -> None:
    ask: dict[str, Any] = {"model": "m", "input": "x", "reasoning": {"effort": "none"}}
    whole = await sdk.responses.create(**ask, max_output_tokens=3)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output[0].status == "incomplete"
    events = [e async for e in await sdk.responses.create(**ask, max_output_tokens=3, stream=True)]
    assert events[-1].type == "response.incomplete"
    assert body_of(events[-1].response) == body_of(whole)


async def test_logprobs_are_those_of_the_text(acting: Any, sdk: openai.AsyncOpenAI) -> None:
    ask: dict[str, Any] = {"model": "m", "input": "x", "tools": TOOLS}
    include: list[Any] = ["message.output_text.logprobs"]
    whole = await sdk.responses.create(**ask, include=include, top_logprobs=2)
    [text] = whole.output[1].content  # type: ignore[union-attr]
    assert "".join(entry.token for entry in text.logprobs) == "Look: "  # type: ignore[union-attr]
    assert all(len(entry.top_logprobs) == 2 for entry in text.logprobs)  # type: ignore[union-attr]
    stream = await sdk.responses.create(**ask, include=include, top_logprobs=2, stream=True)
    tokens = [
        entry.token
        async for event in stream
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    assert "".join(tokens) == "Look: "


async def test_a_tool_loop(acting: Any, sdk: openai.AsyncOpenAI, text_ids: IDS) -> None:
    first = await sdk.responses.create(model="m", input="Hello", tools=TOOLS)
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"result {n}"}
        for n, item in enumerate(i for i in first.output if i.type == "function_call")
    ]
    acting.engine.output_ids = [*text_ids("done</think>It rains."), 531]
    conversation: Any = [{"role": "user", "content": "Hello"}, *first.output, *results]
    second = await sdk.responses.create(model="m", input=conversation, tools=TOOLS)
    assert second.output_text == "It rains."
    prompt = acting.frontend.tokenizer.decode(acting.engine.submits[-1].prompt_ids)
    assert prompt.endswith(
        "<|user|>Hello<|assistant|><think>so</think>Look:<tool_call>weather<arg_key>city</arg_key>"
        "<arg_value>Oslo</arg_value></tool_call><tool_call>noop</tool_call><|observation|>"
        "<tool_response>result 0</tool_response><tool_response>result 1</tool_response>"
        "<|assistant|><think>"
    )


async def test_a_stream_that_breaks_ends_failed(server: Any, sdk: openai.AsyncOpenAI) -> None:
    server.engine.manual = True

    opening = asyncio.create_task(sdk.responses.create(model="m", input="x", stream=True))
    submit = (await server.engine.submitted())[0]
    server.engine.tokens(submit, [275])
    stream = await opening
    server.engine.lose("gone")
    events = [event async for event in stream]
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert "gone" in last.response.error.message
    assert [item.status for item in last.response.output] == ["incomplete"]


async def test_an_aborted_reply_failed(server: Any) -> None:
    server.engine.manual = True
    asking = asyncio.create_task(server.post(PATH, {"input": "x"}))
    submit = (await server.engine.submitted())[0]
    server.engine.finish(submit, "abort")
    status, reply = await asking
    assert (status, reply["status"]) == (200, "failed")
    assert "aborted" in reply["error"]["message"]


async def test_refusals_have_openais_envelope(server: Any, sdk: openai.AsyncOpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.responses.create(
                model="m", input="x", previous_response_id="resp_1", stream=stream
            )
        assert caught.value.param == "previous_response_id"
    status, reply = await server.post(PATH, {"input": "x " * 1000})
    assert (status, reply["error"]["param"]) == (400, "input")
    assert server.engine.submits == []


async def test_a_long_wait_shows_life(server: Any) -> None:
    server.engine.manual = True
    posting = server.session.post(server.url + PATH, json={"input": "x", "stream": True})
    request = asyncio.create_task(posting.__aenter__())
    submit = (await server.engine.submitted())[0]
    generation = next(iter(server.frontend.client._generations.values()))
    blocks = []
    for count in (2, 1):  # what opens the stream, then a comment
        await server.settle(lambda: generation._waiter is not None)
        generation.wake()
        reply = await request
        blocks += [await reply.content.readuntil(b"\n\n") for _ in range(count)]
    assert blocks[0].startswith(b"event: response.created\n")
    assert blocks[1].startswith(b"event: response.in_progress\n")
    assert blocks[2] == b": keep-alive\n\n"
    server.engine.finish(submit, "length", 0)
    assert b"response.incomplete" in await reply.read()


# Required by the schema of a response that OpenAI publishes.
FIELDS = set(
    "id object created_at completed_at status incomplete_details model previous_response_id "
    "instructions output error tools tool_choice truncation parallel_tool_calls text top_p "
    "presence_penalty frequency_penalty top_logprobs temperature reasoning usage "
    "max_output_tokens max_tool_calls store background service_tier metadata "
    "safety_identifier prompt_cache_key".split()
)


async def test_every_field_of_the_schema_is_there_with_the_value_that_was_used(
    server: Any,
) -> None:
    tool = {"type": "function", "name": "f"}
    text = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}
    body = {"input": "x", "tools": [tool], "top_p": 0.5, "truncation": "auto"}
    blocks = (await server.stream("/v1/responses", {**body, "stream": True})).split(b"\n\n")
    responses = [json.loads(block.partition(b"data: ")[2]) for block in blocks[:-1]]
    _, whole = await server.post("/v1/responses", {**body, "presence_penalty": 1, "text": text})
    for response in [whole, *(r["response"] for r in responses if "response" in r)]:
        assert response.keys() >= FIELDS
        assert (response["top_p"], response["frequency_penalty"]) == (0.5, 0)
        assert isinstance(response["temperature"], int | float)
        assert (response["service_tier"], response["truncation"]) == ("default", "disabled")
        whole_tool = {**tool, "description": None, "parameters": None, "strict": False}
        assert response["tools"] == [whole_tool]
    assert whole["presence_penalty"] == 1
    assert whole["text"]["format"].keys() == {"type", "name", "schema", "description", "strict"}
    assert isinstance(whole["completed_at"], int)
