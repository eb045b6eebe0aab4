"""The chat pipeline over HTTP with both parsers on: reasoning, tool calls, and their streams."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest

IDS = Callable[[str], list[int]]
PATH = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "noop"}},
]
WITH_TOOLS: dict[str, Any] = {**HELLO, "tools": TOOLS}
CALLS = (
    '<tool_call>weather<arg_key>city</arg_key><arg_value>Os\n"lo"</arg_value>'
    "<arg_key>n</arg_key><arg_value>3</arg_value></tool_call><tool_call>noop</tool_call>"
)
REPLY = f"so\n</think>\nLook:\n{CALLS}"
ARGUMENTS = '{"city": "Os\\n\\"lo\\"", "n": 3}'


@pytest.fixture
async def parsing(start: Any, text_ids: IDS) -> Any:
    """A server with both parsers on, whose model thinks and calls two tools."""
    server = await start(reasoning_parser="glm45")
    server.engine.output_ids = [*text_ids(REPLY), 533]
    return server


@pytest.fixture
async def sdk(parsing: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    client = openai.AsyncOpenAI(base_url=parsing.url + "/v1", api_key="none", max_retries=0)
    yield client
    await client.close()


async def ask(server: Any, **fields: Any) -> dict[str, Any]:
    status, reply = await server.post(PATH, {**HELLO, **fields})
    assert status == 200, reply
    choice: dict[str, Any] = reply["choices"][0]
    return choice


async def streamed(server: Any, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The choices that a stream adds up to, as a client adds them up."""
    events = await server.events(PATH, {**body, "stream": True})
    assert events.pop() == "[DONE]"
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        (chunk,) = event["choices"]
        assert chunk["logprobs"] is None
        delta = chunk["delta"]
        if "role" in delta:
            assert chunk["index"] not in choices
            assert delta == {"role": "assistant", "content": ""}
            choices[chunk["index"]] = {"content": "", "reasoning": "", "calls": {}, "ends": []}
        choice = choices[chunk["index"]]
        assert not choice["ends"], "something after the end"
        choice["content"] += delta.get("content", "")
        choice["reasoning"] += delta.get("reasoning", "")
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for call in delta.get("tool_calls", []):
            known = choice["calls"].setdefault(call["index"], dict(call, arguments=""))
            known["arguments"] += call["function"]["arguments"]
        if chunk["finish_reason"] is not None:
            assert delta == {}
            choice["ends"].append(chunk["finish_reason"])
    return choices


async def test_a_whole_reply(parsing: Any) -> None:
    status, reply = await parsing.post(PATH, WITH_TOOLS)
    assert status == 200
    choice = reply["choices"][0]
    message = choice["message"]
    ids = [call.pop("id") for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("call_[0-9a-f]{24}", i) for i in ids)
    assert message == {
        "role": "assistant",
        "content": "Look:\n",
        "reasoning_content": "so",
        "reasoning": "so",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}},
            {"type": "function", "function": {"name": "noop", "arguments": "{}"}},
        ],
    }
    assert choice["finish_reason"] == "tool_calls"
    assert reply["usage"]["completion_tokens"] == len(parsing.engine.output_ids)
    assert reply["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


async def test_a_stream_in_full(parsing: Any) -> None:
    parsing.engine.tokens_per_message = 1000
    data = (await parsing.stream(PATH, {**WITH_TOOLS, "stream": True})).decode()
    deltas = re.findall(r'"delta":(.*?),"logprobs":null,"finish_reason":(.*?)\}\]\}\n\n', data)
    call_ids = re.findall(r'"id":"(call_[0-9a-f]{24})"', data)
    assert deltas == [
        ('{"role":"assistant","content":""}', "null"),
        ('{"reasoning_content":"so","reasoning":"so"}', "null"),
        ('{"content":"Look:\\n"}', "null"),
        (
            f'{{"tool_calls":[{{"index":0,"id":"{call_ids[0]}","type":"function",'
            '"function":{"name":"weather","arguments":""}}]}',
            "null",
        ),
        (
            '{"tool_calls":[{"index":0,"function":{"arguments":' + json.dumps(ARGUMENTS) + "}}]}",
            "null",
        ),
        (
            f'{{"tool_calls":[{{"index":1,"id":"{call_ids[1]}","type":"function",'
            '"function":{"name":"noop","arguments":""}}]}',
            "null",
        ),
        ('{"tool_calls":[{"index":1,"function":{"arguments":"{}"}}]}', "null"),
        ("{}", '"tool_calls"'),
    ]
    assert data.endswith("}\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("tokens_per_message", [1, 2, 3, 7, 1000])
async def test_streams_add_up_to_the_whole_reply(parsing: Any, tokens_per_message: int) -> None:
    parsing.engine.tokens_per_message = tokens_per_message
    choices = await streamed(parsing, {**WITH_TOOLS, "n": 3})
    assert sorted(choices) == [0, 1, 2]
    for choice in choices.values():
        assert (choice["reasoning"], choice["content"]) == ("so", "Look:\n")
        assert choice["ends"] == ["tool_calls"]
        calls = choice["calls"]
        assert [calls[n]["function"]["name"] for n in (0, 1)] == ["weather", "noop"]
        assert [calls[n]["arguments"] for n in (0, 1)] == [ARGUMENTS, "{}"]


async def test_string_arguments_stream_while_they_come(parsing: Any, text_ids: IDS) -> None:
    engine = parsing.engine
    engine.manual = True
    async with asyncio.timeout(10):
        posting = parsing.session.post(parsing.url + PATH, json={**WITH_TOOLS, "stream": True})
        request = asyncio.create_task(posting.__aenter__())
        submit = (await engine.submitted())[0]
        engine.tokens(submit, text_ids("</think><tool_call>weather"))
        engine.tokens(submit, text_ids("<arg_key>city</arg_key><arg_value>"))
        reply, data = await request, b""
        for text in ("Os", "lo ", 'say \\ "hi"'):
            engine.tokens(submit, text_ids(text))
            while json.dumps(json.dumps(text)[1:-1])[1:-1].encode() not in data:
                data += await reply.content.readany()
        engine.finish(submit, "abort", 20)
        assert (await reply.read()).endswith(b"data: [DONE]\n\n")


async def test_a_tool_loop_with_the_official_client(
    parsing: Any, sdk: openai.AsyncOpenAI, text_ids: IDS
) -> None:
    messages: list[Any] = list(HELLO["messages"])
    tools: Any = TOOLS
    async with sdk.chat.completions.stream(model="m", messages=messages, tools=tools) as stream:
        async for _ in stream:
            pass
        first = (await stream.get_final_completion()).choices[0].message
    assert first.tool_calls is not None
    assert [call.function.name for call in first.tool_calls] == ["weather", "noop"]
    assert json.loads(first.tool_calls[0].function.arguments) == {"city": 'Os\n"lo"', "n": 3}
    messages.append(first.model_dump(exclude_none=True))
    for call in first.tool_calls:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
    parsing.engine.output_ids = [*text_ids("done</think>It rains."), 524]
    second = await sdk.chat.completions.create(model="m", messages=messages, tools=tools)
    assert second.choices[0].message.content == "It rains."
    assert second.choices[0].finish_reason == "stop"
    assert second.usage is not None
    assert second.usage.completion_tokens_details is not None
    assert second.usage.completion_tokens_details.reasoning_tokens == len(text_ids("done"))
    prompt = parsing.frontend.tokenizer.decode(parsing.engine.submits[-1].prompt_ids)
    assert prompt.endswith(
        f"<|user|>Hello<|assistant|><think>so</think>Look:{CALLS}<|observation|>"
        "<tool_response>rain</tool_response><tool_response>rain</tool_response><|assistant|><think>"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"thinking": False}},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}, "thinking": {"type": "enabled"}},
    ],
)
async def test_thinking_off(parsing: Any, text_ids: IDS, fields: dict[str, Any]) -> None:
    parsing.engine.output_ids = text_ids("just this")
    message = (await ask(parsing, **fields))["message"]
    assert (message["content"], message["reasoning_content"]) == ("just this", None)
    prompt = parsing.frontend.tokenizer.decode(parsing.engine.submits[-1].prompt_ids)
    assert prompt.endswith("<|assistant|></think>")


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high"])
async def test_other_efforts_leave_thinking_on(parsing: Any, effort: str) -> None:
    body = {"reasoning_effort": effort, "chat_template_kwargs": {"enable_thinking": None}}
    assert (await ask(parsing, **body))["message"]["reasoning"] == "so"


async def test_all_reasoning_when_the_tokens_run_out(parsing: Any, text_ids: IDS) -> None:
    parsing.engine.output_ids = text_ids("on and on")
    choice = await ask(parsing, max_tokens=2)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"]


async def test_reasoning_joined_to_the_content(parsing: Any) -> None:
    choice = await ask(parsing, separate_reasoning=False, tools=TOOLS)
    assert choice["message"]["content"] == "soLook:\n"
    assert choice["message"]["reasoning"] is None
    assert choice["finish_reason"] == "tool_calls"


async def test_reasoning_left_out(parsing: Any) -> None:
    choice = await ask(parsing, include_reasoning=False, tools=TOOLS)
    assert choice["message"]["content"] == "Look:\n"
    assert choice["message"]["reasoning"] is None
    assert choice["finish_reason"] == "tool_calls"


async def test_without_a_reasoning_parser_the_text_is_raw(start: Any, text_ids: IDS) -> None:
    server = await start()
    server.engine.output_ids = text_ids("so\n</think>\nyes")
    choice = await ask(server)
    assert choice["message"]["content"] == "so\n</think>\nyes"
    assert choice["message"]["reasoning"] is None


async def test_unclosed_reasoning_is_repeated_if_the_server_says_so(
    start: Any, text_ids: IDS
) -> None:
    server = await start(reasoning_parser="glm45", repeat_unclosed_reasoning=True)
    server.engine.output_ids = [*text_ids("all of it"), 524]
    message = (await ask(server))["message"]
    assert (message["reasoning"], message["content"]) == ("all of it", "all of it")


@pytest.mark.parametrize("server_wide", [False, True])
async def test_preserved_thinking(start: Any, server_wide: bool) -> None:
    server = await start(reasoning_parser="glm45", preserve_thinking=server_wide)
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "OLD"},
        {"role": "user", "content": "c"},
    ]
    for kwargs in ({}, {"clear_thinking": False}, {"clear_thinking": True}):
        await ask(server, messages=history, chat_template_kwargs=kwargs)
    prompts = [server.frontend.tokenizer.decode(s.prompt_ids) for s in server.engine.submits]
    assert ["OLD" in prompt for prompt in prompts] == [server_wide, True, False]


async def test_no_calls_without_tools_or_with_choice_none(parsing: Any) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = await ask(parsing, **fields)
        assert choice["message"]["content"] == f"Look:\n{CALLS}"
        assert choice["message"]["tool_calls"] is None
        assert choice["finish_reason"] == "stop"


async def test_a_tool_that_was_not_declared_is_text(parsing: Any) -> None:
    choice = await ask(parsing, tools=TOOLS[1:])
    text, noop = CALLS.split("<tool_call>noop")
    assert choice["message"]["content"] == "Look:\n" + text
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["noop"]
    assert noop == "</tool_call>"


async def test_a_call_that_is_cut_off(parsing: Any, text_ids: IDS) -> None:
    cut = len(text_ids(REPLY.split('\n"lo')[0]))
    choice = await ask(parsing, tools=TOOLS, max_tokens=cut)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Os'
    choices = await streamed(parsing, {**WITH_TOOLS, "max_tokens": cut})
    assert choices[0]["calls"][0]["arguments"] == '{"city": "Os'
    assert choices[0]["ends"] == ["length"]


async def test_stop_strings_end_the_content(parsing: Any) -> None:
    choice = await ask(parsing, tools=TOOLS, stop=["so", "Os", "ook"])
    assert choice["message"]["reasoning"] == "so"
    assert choice["message"]["content"] == "L"
    assert choice["message"]["tool_calls"] is None
    assert choice["finish_reason"] == "stop"
    await parsing.settle(lambda: parsing.frontend.num_open == 0)


async def test_logprobs_are_those_of_the_content(parsing: Any) -> None:
    body = {**WITH_TOOLS, "logprobs": True, "top_logprobs": 1}
    _, reply = await parsing.post(PATH, body)
    content = reply["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content).lstrip("\n") == "Look:\n"
    events = await parsing.events(PATH, {**body, "stream": True})
    found = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert [entry for logprobs in found if logprobs for entry in logprobs["content"]] == content
    _, reply = await parsing.post(PATH, {**HELLO, "logprobs": True, "max_tokens": 1})
    assert reply["choices"][0]["logprobs"] == {"content": [], "refusal": None}


async def test_fields_that_have_no_effect_are_accepted(parsing: Any) -> None:
    await ask(
        parsing,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        stream_reasoning=False,
        modalities=["text"],
        parallel_tool_calls=True,
        function_call="none",
        role_settings={"a": 1},
        character_settings={"b": 2},
        prompt_cache_key="k",
        verbosity="low",
    )


async def test_a_template_that_hangs_leaves_the_server_answering(
    start: Any, tmp_path: Path
) -> None:
    template = tmp_path / "t.jinja"
    loops = "".join(f"{{% for x{n} in range(99999) %}}" for n in range(4)) + "{% endfor %}" * 4
    template.write_text(f"{{% if messages[0].content == 'hang' %}}{loops}{{% endif %}}hello")
    server = await start(chat_template=str(template))
    server.frontend.tokenizer._renderer.child.limit_s = 0.3
    hang = {"messages": [{"role": "user", "content": "hang"}]}
    for stream in (False, True):
        status, reply = await server.post(PATH, {**hang, "stream": stream})
        assert (status, reply["error"]["param"]) == (400, "messages")
        assert "longer than 0.3 s" in reply["message"]
    assert (await server.post(PATH, HELLO))[0] == 200


async def test_deep_nesting_is_the_clients_error(server: Any) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"a": [deep]}
    too_deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    status, _ = await server.post(PATH, {**HELLO, "tools": [tool]})
    assert status in (200, 400)
    for field in ("tools", "messages", "chat_template_kwargs", "metadata"):
        data = f'{{"messages": [], "{field}": {too_deep}}}'
        async with server.session.post(server.url + PATH, data=data) as reply:
            assert reply.status == 400
    assert (await server.post(PATH, HELLO))[0] == 200
