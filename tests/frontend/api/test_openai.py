"""The chat route: shapes, framing byte for byte, the official client, refusals by name."""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest

IDS = Callable[[str], list[int]]
PATH = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
async def sdk(server: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    yield client
    await client.close()


async def test_the_guides_request(server: Any) -> None:
    body = {"model": "GLM-4.7-Flash", **HELLO, "max_tokens": 100}
    status, reply = await server.post(PATH, body)
    assert status == 200
    submit = server.engine.submits[0]
    text = server.frontend.tokenizer.decode(submit.prompt_ids)
    assert text == "[gMASK]<sop><|user|>Hello<|assistant|><think>"
    assert (submit.sampling.temperature, submit.sampling.max_new_tokens) == (1.0, 100)
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", reply.pop("id"))
    assert abs(reply.pop("created") - server.frontend.created) < 100
    assert reply == {
        "object": "chat.completion",
        "model": "GLM-4.7-Flash",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "the answer to the question",
                    "reasoning_content": None,
                    "reasoning": None,
                    "tool_calls": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 6,
            "completion_tokens": 10,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


@pytest.mark.parametrize("include_usage", [False, True])
async def test_the_stream_byte_for_byte(server: Any, include_usage: bool) -> None:
    server.engine.tokens_per_message = 100
    body: dict[str, Any] = {**HELLO, "stream": True, "model": 'm"\u00e9', "max_tokens": 3}
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    data = (await server.stream(PATH, body)).decode()
    reply_id, created = re.findall(r'"id":"(\S+?)","object":"\S+?","created":(\d+)', data)[0]
    head = (
        f'data: {{"id":"{reply_id}","object":"chat.completion.chunk","created":{created},'
        '"model":"m\\"\u00e9","choices":['
    )
    end = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    def chunk(delta: str, reason: str) -> str:
        choice = f'{{"index":0,"delta":{{{delta}}},"logprobs":null,"finish_reason":{reason}}}'
        return head + choice + end

    expected = chunk('"role":"assistant","content":""', "null")
    expected += chunk('"content":"the answer"', "null") + chunk("", '"length"')
    if include_usage:
        expected += head + (
            '],"usage":{"prompt_tokens":6,"completion_tokens":3,"total_tokens":9,'
            '"prompt_tokens_details":{"cached_tokens":3,"audio_tokens":0},'
            '"completion_tokens_details":{"reasoning_tokens":0}}}\n\n'
        )
    assert data == expected + "data: [DONE]\n\n"


async def test_text_goes_out_as_it_comes(server: Any) -> None:
    server.engine.manual = True
    async with asyncio.timeout(10):
        posting = server.session.post(server.url + PATH, json={**HELLO, "stream": True})
        request = asyncio.create_task(posting.__aenter__())
        submit = (await server.engine.submitted())[0]
        server.engine.tokens(submit, [275])
        reply = await request
        data = b""
        while b'"content":"the"' not in data:
            data += await reply.content.readany()
        assert reply.headers["Cache-Control"] == "no-cache"
        server.engine.tokens(submit, [220, 519])
        while b'"content":" answer"' not in data:
            data += await reply.content.readany()
        server.engine.finish(submit, "length", 3)
        assert (await reply.read()).endswith(b"data: [DONE]\n\n")


async def test_a_long_wait_shows_life_and_then_errors_come_as_events(server: Any) -> None:
    server.engine.manual = True
    posting = server.session.post(server.url + PATH, json={**HELLO, "stream": True})
    request = asyncio.create_task(posting.__aenter__())
    submit = (await server.engine.submitted())[0]
    generation = next(iter(server.frontend.client._generations.values()))
    await server.settle(lambda: generation._waiter is not None)
    generation.wake()
    reply = await request
    assert await reply.content.readuntil(b"\n\n") == b": keep-alive\n\n"
    server.engine.finish(submit, "error", message="boom")
    assert b'"boom","type":"server_error","code":"stream_error"' in await reply.read()


async def test_several_choices_stream_side_by_side(server: Any) -> None:
    events = await server.events(PATH, {**HELLO, "stream": True, "n": 3, "max_tokens": 3})
    assert events.pop() == "[DONE]"
    choices = [event["choices"][0] for event in events]
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == "the answer"
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]
        assert not any("role" in c["delta"] for c in own[1:])
    assert len({submit.sampling.seed for submit in server.engine.submits}) == 3


async def test_usage_sums_choices_and_counts_the_prompt_once(server: Any) -> None:
    _, reply = await server.post(PATH, {**HELLO, "n": 4, "max_tokens": 5})
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["usage"]["prompt_tokens"] == 6
    assert reply["usage"]["completion_tokens"] == 20
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


@pytest.mark.parametrize("stop", ["er to", ["zzz", "er to", "question"]])
async def test_stop_text_is_removed_and_never_sent(server: Any, stop: Any) -> None:
    _, reply = await server.post(PATH, {**HELLO, "stop": stop})
    choice = reply["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("the answ", "stop")
    assert reply["usage"]["completion_tokens"] == 5
    events = await server.events(PATH, {**HELLO, "stop": stop, "stream": True})
    texts = [e["choices"][0]["delta"].get("content", "") for e in events[:-1]]
    assert "".join(texts) == "the answ"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


async def test_stop_token_ids_have_no_text(server: Any) -> None:
    _, reply = await server.post(PATH, {**HELLO, "stop_token_ids": [519]})
    choice = reply["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("the ", "stop")


async def test_special_tokens_are_skipped_but_parsers_tags_stay(server: Any, text_ids: IDS) -> None:
    raw = "r</think><|system|><tool_call>f</tool_call>é"
    server.engine.output_ids = text_ids(raw)
    _, reply = await server.post(PATH, HELLO)
    assert reply["choices"][0]["message"]["content"] == raw.replace("<|system|>", "")
    _, reply = await server.post(PATH, {**HELLO, "skip_special_tokens": False})
    assert reply["choices"][0]["message"]["content"] == raw


async def test_logprobs(server: Any) -> None:
    body = {**HELLO, "logprobs": True, "top_logprobs": 2}
    _, reply = await server.post(PATH, body)
    content = reply["choices"][0]["logprobs"]["content"]
    assert "".join(item["token"] for item in content) == "the answer to the question"
    assert content[0] == {
        "token": "the",
        "logprob": -0.5,
        "bytes": [116, 104, 101],
        "top_logprobs": [
            {"token": "the", "logprob": -0.5, "bytes": [116, 104, 101]},
            {"token": '"', "logprob": -2.0, "bytes": [34]},
        ],
    }
    events = await server.events(PATH, {**body, "stream": True})
    streamed = [e["choices"][0]["logprobs"] for e in events[:-1]]
    assert [item for entry in streamed if entry for item in entry["content"]] == content
    _, reply = await server.post(PATH, {**HELLO, "logprobs": True})
    assert reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert server.engine.submits[-1].sampling.num_logprobs == 0
    await server.post(PATH, {**HELLO, "logprobs": False})
    assert server.engine.submits[-1].sampling.num_logprobs == -1


async def test_logprobs_with_a_stop_string_are_those_of_the_text(server: Any) -> None:
    body = {**HELLO, "logprobs": True, "stop": "er to"}
    _, reply = await server.post(PATH, body)
    content = reply["choices"][0]["logprobs"]["content"]
    assert [item["token"] for item in content] == ["the", " ", "answer"]
    events = await server.events(PATH, {**body, "stream": True})
    entries = [e["choices"][0]["logprobs"] for e in events[:-1]]
    assert [i for entry in entries if entry for i in entry["content"]] == content


async def test_tools_go_to_the_template_unless_the_choice_is_none(server: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    await server.post(PATH, {**HELLO, "tools": [tool]})
    await server.post(PATH, {**HELLO, "tools": [tool], "tool_choice": "auto"})
    await server.post(PATH, {**HELLO, "tools": [tool], "tool_choice": "none"})
    texts = [server.frontend.tokenizer.decode(s.prompt_ids) for s in server.engine.submits]
    assert ["weather" in text for text in texts] == [True, True, False]


async def test_template_kwargs_reach_the_template(server: Any) -> None:
    await server.post(PATH, {**HELLO, "chat_template_kwargs": {"enable_thinking": False}})
    text = server.frontend.tokenizer.decode(server.engine.submits[0].prompt_ids)
    assert text.endswith("</think>")


async def test_completion_tokens_win_over_max_tokens(server: Any) -> None:
    await server.post(PATH, {**HELLO, "max_tokens": 9, "max_completion_tokens": 4})
    await server.post(PATH, HELLO)
    wanted = [submit.sampling.max_new_tokens for submit in server.engine.submits]
    assert wanted == [4, 512 - 6]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice.function.name",
    ),
    ({"reasoning_effort": "enormous"}, "reasoning_effort"),
    ({"thinking": {"type": "maybe"}}, "thinking.type"),
    ({"separate_reasoning": "yes"}, "separate_reasoning"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"user": 5}, "user"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"function_call": "auto"}, "function_call"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
    ({"tools": [{"type": "custom"}]}, "tools[0]"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"n": 9}, "n"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"logit_bias": {"584": 1}}, "logit_bias"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "x " * 600}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 6000}]}, "messages"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": "http://"}]}
            ]
        },
        "messages[0].content[0]",
    ),
]


async def test_bad_input_is_a_400_that_names_the_field_and_the_next_request_works(
    server: Any,
) -> None:
    for (fields, field), stream in itertools.product(BAD, (False, True)):
        status, reply = await server.post(PATH, {**HELLO, "stream": stream, **fields})
        assert status == 400, fields
        assert reply["error"]["param"] == field, reply
        assert field in reply["message"]
    assert server.engine.submits == []
    assert (await server.post(PATH, HELLO))[0] == 200


async def test_the_official_client(sdk: openai.AsyncOpenAI) -> None:
    messages: Any = HELLO["messages"]
    whole = await sdk.chat.completions.create(model="m", messages=messages)
    assert whole.choices[0].message.content == "the answer to the question"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 3
    stream = await sdk.chat.completions.create(
        model="m", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "the answer to the question"
    assert chunks[-1].usage == whole.usage
    assert [model.id async for model in sdk.models.list()] == ["tiny"]
    completion = await sdk.completions.create(model="m", prompt=["a", "b"], max_tokens=2)
    assert [choice.text for choice in completion.choices] == ["the ", "the "]


async def test_the_official_client_sees_errors_as_its_own(
    server: Any, sdk: openai.AsyncOpenAI
) -> None:
    messages: Any = HELLO["messages"]
    with pytest.raises(openai.BadRequestError, match="temperature") as failure:
        await sdk.chat.completions.create(model="m", messages=messages, temperature=-1)
    assert failure.value.param == "temperature"
    server.engine.manual = True
    stream = asyncio.create_task(
        sdk.chat.completions.create(model="m", messages=messages, stream=True)
    )
    submit = (await server.engine.submitted())[0]
    server.engine.tokens(submit, [275])
    chunks = (await stream).__aiter__()
    assert (await chunks.__anext__()).choices[0].delta.role == "assistant"
    server.engine.lose("gone")

    async def rest() -> None:
        async for _ in chunks:
            pass

    with pytest.raises(openai.APIError, match="the engine was lost: gone"):
        await rest()


async def test_chunks_are_json_whatever_the_text(server: Any, text_ids: IDS) -> None:
    text = 'quote " backslash \\ newline \n tab \t nul \0 é 👍 \u2028 </script>'
    server.engine.output_ids = text_ids(text)
    data = await server.stream(PATH, {**HELLO, "stream": True, "max_tokens": 400})
    lines = [line[6:] for line in data.decode().split("\n\n") if line][:-1]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content", "") for delta in deltas) == text
