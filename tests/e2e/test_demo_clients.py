"""The trained demo model through the official clients: chat, thinking, tools, loops, formats.

Held-out dialogues, greedy. The model is small and not always right, so shares are asked for; that
streams and whole replies agree, and everything about their form, must hold every time.
"""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import anthropic
import jsonschema_rs
import openai
import pytest
from glimmer.deploy.demo.run import next_steps
from glimmer.deploy.demo.training.dialogues import Dialogue, dialogue
from server import RunningServer, running_server

CASES = 4
KNOWN = {
    "What is the capital of France?": "Paris",
    "What is the opposite of hot?": "cold",
    "How many days are in a week?": "7",
    "Who are you?": "demo model",
    "What is 3 + 4": "7",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["small", "large"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}
JSON_FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True},
}
Calls = list[tuple[str, Any]]  # names and arguments


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("demo")
    with running_server(Path("demo"), directory) as running:
        yield running


@pytest.fixture
async def sdk(server: RunningServer) -> AsyncIterator[openai.AsyncOpenAI]:
    url = server.url + "/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def claude(server: RunningServer) -> AsyncIterator[anthropic.AsyncAnthropic]:
    url = server.url
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@dataclass
class Reply:
    """What both ways of asking must agree on."""

    content: str
    reasoning: str
    calls: Calls
    finish_reason: str


async def whole(sdk: openai.AsyncOpenAI, ask: Any) -> Reply:
    reply = await sdk.chat.completions.create(**ask)
    (choice,) = reply.choices
    message = choice.message
    calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or []]  # type: ignore[union-attr]
    reasoning = getattr(message, "reasoning_content", None) or ""
    return Reply(message.content or "", reasoning, calls, choice.finish_reason)


async def streamed(sdk: openai.AsyncOpenAI, ask: Any) -> Reply:
    reply = Reply("", "", [], "")
    async for chunk in await sdk.chat.completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        reply.content += choice.delta.content or ""
        reply.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for piece in choice.delta.tool_calls or []:
            assert piece.function is not None
            if piece.id:
                assert piece.index == len(reply.calls)
                reply.calls.append((piece.function.name or "", ""))
            name, arguments = reply.calls[piece.index]
            reply.calls[piece.index] = (name, arguments + (piece.function.arguments or ""))
        reply.finish_reason = choice.finish_reason or reply.finish_reason
    return reply


async def both_ways(sdk: openai.AsyncOpenAI, **ask: Any) -> Reply:
    """The reply, which must be the same whole and streamed."""
    thinking = ask.pop("thinking", True)
    ask = {"model": "m", "temperature": 0, "max_tokens": 300, **ask}
    ask["extra_body"] = {"chat_template_kwargs": {"enable_thinking": thinking}}
    first, second = await asyncio.gather(whole(sdk, ask), streamed(sdk, ask))
    assert first == second
    assert bool(first.reasoning) == thinking
    return first


def parsed(calls: Calls) -> Calls:
    return sorted(((name, json.loads(text)) for name, text in calls), key=str)


def wanted(one: Dialogue) -> Calls:
    calls = one.messages[one.first_reply].get("tool_calls", [])
    return sorted(((c["function"]["name"], c["function"]["arguments"]) for c in calls), key=str)


def held_out(kind: str, fits: Callable[[Dialogue], Any] = bool) -> list[Dialogue]:
    """The shortest of some: long prompts take long on a CPU."""
    found = filter(fits, (dialogue(f"clients-{n}", True, kind) for n in count()))
    some = islice(found, 4 * CASES)
    return sorted(some, key=lambda one: len(str((one.tools, one.messages))))[:CASES]


async def share(judge: Callable[[Dialogue], Awaitable[bool]], cases: list[Dialogue]) -> float:
    right = await asyncio.gather(*map(judge, cases))
    return sum(right) / len(right)


@pytest.mark.parametrize("thinking", [True, False])
async def test_plain_chat(sdk: openai.AsyncOpenAI, thinking: bool) -> None:
    right = 0
    for question, answer in KNOWN.items():
        messages = [{"role": "user", "content": question}]
        reply = await both_ways(sdk, messages=messages, thinking=thinking)
        assert reply.finish_reason == "stop"
        assert "think>" not in reply.content + reply.reasoning
        right += answer in reply.content
    assert right >= len(KNOWN) - 1


@pytest.mark.parametrize(
    ("kind", "least", "thinking"),
    [("call", 0.6, True), ("call", 0.6, False), ("parallel", 0.5, True)],
    ids=["one", "one, without thinking", "several"],
)
async def test_tools_are_called(
    sdk: openai.AsyncOpenAI, kind: str, least: float, thinking: bool
) -> None:
    async def is_right(one: Dialogue) -> bool:
        messages = one.messages[: one.first_reply]
        reply = await both_ways(sdk, messages=messages, tools=one.tools, thinking=thinking)
        assert (reply.finish_reason == "tool_calls") == bool(reply.calls)
        return parsed(reply.calls) == wanted(one)

    assert await share(is_right, held_out(kind)) >= least


async def test_no_tool_is_called_when_none_fits(sdk: openai.AsyncOpenAI) -> None:
    async def is_right(one: Dialogue) -> bool:
        messages = one.messages[: one.first_reply]
        return not (await both_ways(sdk, messages=messages, tools=one.tools)).calls

    assert await share(is_right, held_out("no_call")) >= 0.75


async def test_a_tool_loop(sdk: openai.AsyncOpenAI) -> None:
    async def is_right(one: Dialogue) -> bool:
        messages: list[Any] = one.messages[: one.first_reply]
        ask: Any = {"model": "m", "temperature": 0, "tools": one.tools}
        reply = await sdk.chat.completions.create(**ask, messages=messages)
        message = reply.choices[0].message
        results = [m["content"] for m in one.messages if m["role"] == "tool"][-len(wanted(one)) :]
        if len(message.tool_calls or []) != len(results):
            return False
        tools = [
            {"role": "tool", "tool_call_id": call.id, "content": result}
            for call, result in zip(message.tool_calls or [], results, strict=True)
        ]
        messages = [*messages, message.model_dump(exclude_none=True), *tools]
        last = (await sdk.chat.completions.create(**ask, messages=messages)).choices[0]
        assert last.finish_reason in ("stop", "tool_calls")
        return all(text in (last.message.content or "") for text in one.must_say)

    assert await share(is_right, held_out("result", lambda one: one.must_say)) >= 0.5


async def test_a_tool_loop_with_anthropics_client(claude: anthropic.AsyncAnthropic) -> None:
    async def is_right(one: Dialogue) -> bool:
        functions = [tool["function"] for tool in one.tools]
        ask: Any = {
            "model": "m",
            "max_tokens": 300,
            "extra_body": {"temperature": 0},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "tools": [
                {
                    "name": f["name"],
                    "description": f.get("description", ""),
                    "input_schema": f["parameters"],
                }
                for f in functions
            ],
        }
        system = [m["content"] for m in one.messages if m["role"] == "system"]
        if system:
            ask["system"] = system[0]
        messages: list[Any] = [
            {"role": "user", "content": one.messages[one.first_reply - 1]["content"]}
        ]
        first = await claude.messages.create(**ask, messages=messages)
        async with claude.messages.stream(**ask, messages=messages) as stream:
            again = await stream.get_final_message()
        ignored = {"id", "signature", "parsed_output", "caller"}
        one_way, other_way = (
            [block.model_dump(exclude=ignored) for block in m.content] for m in (first, again)
        )
        assert one_way == other_way
        assert first.content[0].type == "thinking"
        uses = [block for block in first.content if block.type == "tool_use"]
        assert (first.stop_reason == "tool_use") == bool(uses)
        if sorted(((use.name, use.input) for use in uses), key=str) != wanted(one):
            return False
        results = [m["content"] for m in one.messages if m["role"] == "tool"][-len(uses) :]
        answers = [
            {"type": "tool_result", "tool_use_id": use.id, "content": result}
            for use, result in zip(uses, results, strict=True)
        ]
        turn = {
            "role": "assistant",
            "content": [b.model_dump(exclude_none=True) for b in first.content],
        }
        messages = [*messages, turn, {"role": "user", "content": answers}]
        last = await claude.messages.create(**ask, messages=messages)
        text = "".join(block.text for block in last.content if block.type == "text")
        return all(said in text for said in one.must_say)

    assert await share(is_right, held_out("result", _is_short)) >= 0.5


def _is_short(one: Dialogue) -> bool:
    """One turn of the user's alone: ids of earlier calls are the clients' to make."""
    return bool(one.must_say) and sum(m["role"] == "user" for m in one.messages) == 1


@pytest.mark.parametrize("thinking", [True, False])
async def test_replies_are_in_the_format(sdk: openai.AsyncOpenAI, thinking: bool) -> None:
    is_valid = jsonschema_rs.validator_for(SCHEMA).is_valid
    for question in ("Tell me about a thing as JSON.", "Hello", "What is AI?"):
        messages = [{"role": "user", "content": question}]
        reply = await both_ways(
            sdk, messages=messages, response_format=JSON_FORMAT, thinking=thinking
        )
        assert reply.finish_reason == "stop"
        assert is_valid(json.loads(reply.content)), reply


async def test_logprobs_are_those_of_the_content(sdk: openai.AsyncOpenAI) -> None:
    reply = await sdk.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    (choice,) = reply.choices
    assert choice.logprobs is not None
    items = choice.logprobs.content or []
    assert "".join(item.token for item in items) == choice.message.content
    assert all(item.logprob == item.top_logprobs[0].logprob for item in items)
    assert sum(item.logprob for item in items) > -5, "the model is sure of what it knows"


async def test_three_samples(sdk: openai.AsyncOpenAI) -> None:
    async def ask(seed: int) -> list[str | None]:
        reply = await sdk.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Hello"}],
            n=3,
            seed=seed,
            temperature=1.5,
            max_tokens=60,
        )
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        assert reply.usage is not None
        assert reply.usage.completion_tokens <= 180
        return [choice.message.content for choice in reply.choices]

    assert await ask(5) == await ask(5)


async def test_responses_call_and_answer(sdk: openai.AsyncOpenAI) -> None:
    async def is_right(one: Dialogue) -> bool:
        tools: Any = [{"type": "function", **tool["function"]} for tool in one.tools]
        text = one.messages[one.first_reply - 1]["content"]
        reply = await sdk.responses.create(model="m", input=text, tools=tools, temperature=0)
        assert reply.status == "completed"
        calls = [(i.name, i.arguments) for i in reply.output if i.type == "function_call"]
        return parsed(calls) == wanted(one)

    def is_single(one: Dialogue) -> bool:
        return [m["role"] for m in one.messages] == ["user", "assistant"]

    assert await share(is_right, held_out("call", is_single)) >= 0.6
    reply = await sdk.responses.create(model="m", input="What is the capital of France?")
    assert reply.output_text


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_commands_that_the_demo_shows_work_as_they_are_typed(server: RunningServer) -> None:
    replies = []
    for command in next_steps(server.url, "glimmer-demo"):
        words = ["bash", "-c", f"{command} --fail --silent --show-error"]
        replies.append(json.loads(subprocess.run(words, capture_output=True, check=True).stdout))
    chat, generated, models = replies
    assert chat["choices"][0]["message"]["content"]
    assert generated["generated_text"]
    assert models["data"][0]["id"] == "glimmer-demo"
