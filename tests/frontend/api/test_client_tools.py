"""Tools that clients run reach the model as functions, and calls come back in the client's form."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from glimmer.frontend.chat.client_tools import input_text
from glimmer.frontend.text.tokenizer import Tokenizer

from ..conftest import Harness

pytestmark = pytest.mark.asyncio(loop_scope="module")
Body = dict[str, Any]
PATCH = {"type": "custom", "name": "apply_edit", "description": "Edits."}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: begin"}
FUNCTION = {"type": "function", "name": "look", "parameters": {"type": "object"}}
GROUP = {"type": "namespace", "name": "mcp__files", "tools": [FUNCTION]}
SEARCH = {"type": "web_search"}
LIMITED = {"max_output_tokens": 200}


def written(name: str, **arguments: str) -> str:
    pairs = [f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in arguments.items()]
    return f"</think><tool_call>{name}{''.join(pairs)}</tool_call>"


@pytest_asyncio.fixture(loop_scope="module")
async def server(long_server: Harness, tokenizer: Tokenizer) -> AsyncIterator[Harness]:
    usual = long_server.engine.output_ids
    yield long_server.reset()
    long_server.engine.output_ids = usual


def say(server: Harness, text: str) -> None:
    ids = server.frontend.tokenizer._encode(text, False)
    server.engine.output_ids = [*ids, server.frontend.facts.eos_ids[0]]


def prompt(server: Harness) -> str:
    return server.frontend.tokenizer.decode(server.engine.submits[-1].prompt_ids)


async def respond(server: Harness, tools: list[Body], **more: Any) -> tuple[list[Body], list[Body]]:
    """The output of a whole reply and the events of a streamed one, ids apart."""
    body = {"input": "go", "tools": tools, **LIMITED, **more}
    status, reply = await server.post("/v1/responses", body)
    assert status == 200, reply
    blocks = (await server.stream("/v1/responses", {**body, "stream": True})).decode()
    events = [data_of(block) for block in blocks.split("\n\n")[:-1]]
    streamed = events[-1]["response"]["output"]
    assert [without_ids(item) for item in streamed] == [without_ids(i) for i in reply["output"]]
    return reply["output"], events


def data_of(block: str) -> Body:
    value: Body = json.loads(block.partition("data: ")[2])
    return value


def without_ids(item: Body) -> Body:
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


async def test_a_free_text_tool_is_a_function_with_one_string(server: Harness) -> None:
    text = '*** Begin\n+"a" \\ é'
    say(server, written("apply_edit", input=text))
    output, events = await respond(server, [{**PATCH, "format": GRAMMAR}])
    assert [without_ids(item) for item in output] == [
        {"type": "custom_tool_call", "name": "apply_edit", "input": text, "status": "completed"}
    ]
    done = [e for e in events if "custom_tool_call_input" in e["type"]]
    assert [e.get("delta", e.get("input")) for e in done] == [text, text]
    added = next(e["item"] for e in events if e["type"] == "response.output_item.added")
    assert (added["type"], added["input"]) == ("custom_tool_call", "")
    assert '"name": "apply_edit"' in prompt(server)
    assert "lark grammar:\\nstart: begin" in prompt(server)


async def test_calls_that_were_made_look_as_the_model_wrote_them(server: Harness) -> None:
    text = "*** Begin"
    say(server, written("apply_edit", input=text))
    [call], _ = await respond(server, [PATCH])
    items = [
        {"role": "user", "content": "go"},
        call,
        {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "done"},
    ]
    status, reply = await server.post(
        "/v1/responses", {"input": items, "tools": [PATCH], **LIMITED}
    )
    assert status == 200, reply
    assert written("apply_edit", input=text) in prompt(server)


async def test_tools_in_a_group_have_its_name(server: Harness) -> None:
    say(server, written("mcp__files__look", path="x"))
    output, _ = await respond(server, [GROUP, SEARCH])
    [item] = [without_ids(item) for item in output]
    assert (item["name"], item["namespace"]) == ("look", "mcp__files")
    assert item["arguments"] == '{"path": "x"}'
    items = [{"role": "user", "content": "go"}, output[0], {"role": "user", "content": "on"}]
    await server.post("/v1/responses", {"input": items, **LIMITED})
    assert "<tool_call>mcp__files__look<arg_key>" in prompt(server)


@pytest.mark.parametrize(
    ("kind", "arguments", "member", "expected"),
    [
        ("local_shell", {"command": '["ls", "-l"]'}, "action", {"command": ["ls", "-l"]}),
        ("shell", {"commands": '["ls"]', "timeout_ms": "5"}, "action", {"timeout_ms": 5}),
        ("apply_patch", {"type": "delete_file", "path": "a"}, "operation", {"path": "a"}),
    ],
)
async def test_tools_of_the_users_machine(
    server: Harness, kind: str, arguments: dict[str, str], member: str, expected: Body
) -> None:
    say(server, written(kind, **arguments))
    output, _ = await respond(server, [{"type": kind}], tool_choice="auto")
    [item] = output
    assert item["type"] == f"{kind}_call"
    assert item[member].items() >= expected.items()
    items = [{"role": "user", "content": "go"}, item, {"role": "user", "content": "on"}]
    await server.post("/v1/responses", {"input": items, **LIMITED})
    assert f"<tool_call>{kind}<arg_key>{next(iter(arguments))}</arg_key>" in prompt(server)


async def test_a_tool_choice_names_them(server: Harness) -> None:
    for choice in ({"type": "custom", "name": "apply_edit"}, {"type": "local_shell"}):
        body = {"input": "go", "tools": [PATCH, {"type": "local_shell"}], "tool_choice": choice}
        status, reply = await server.post("/v1/responses", {**body, **LIMITED})
        assert status == 200, reply
        assert server.engine.submits[-1].grammar is not None
    body = {"input": "go", "tools": [SEARCH], "tool_choice": {"type": "web_search"}}
    status, reply = await server.post("/v1/responses", body)
    assert (status, reply["error"]["param"]) == (400, "tool_choice")


async def test_chats_have_free_text_tools_too(server: Harness) -> None:
    say(server, written("edit", input='a "b"') + written("look", path="x").removeprefix("</think>"))
    tools = [
        {"type": "custom", "custom": {"name": "edit", "format": {"grammar": GRAMMAR}}},
        {"type": "function", "function": {"name": "look"}},
        {"type": "mcp", "server_label": "m"},
    ]
    body = {"messages": [{"role": "user", "content": "go"}], "tools": tools, "max_tokens": 200}
    _, reply = await server.post("/v1/chat/completions", body)
    calls = reply["choices"][0]["message"]["tool_calls"]
    custom = {"name": "edit", "input": 'a "b"'}
    assert [call["type"] for call in calls] == ["custom", "function"]
    assert calls[0]["custom"] == custom
    events = await server.events("/v1/chat/completions", {**body, "stream": True})
    deltas = [e["choices"][0]["delta"] for e in events[:-1]]
    parts = [call for delta in deltas for call in delta.get("tool_calls") or []]
    assert parts[0]["custom"] == {"name": "edit", "input": ""}
    assert parts[-1] == {"index": 0, "custom": {"input": 'a "b"'}}
    messages = [*body["messages"], {"role": "assistant", "tool_calls": calls}]
    result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "done"}
    status, reply = await server.post(
        "/v1/chat/completions", {**body, "messages": [*messages, result]}
    )
    assert status == 200, reply
    assert written("edit", input='a "b"') in prompt(server)
    choice = {"type": "custom", "custom": {"name": "edit"}}
    status, reply = await server.post("/v1/chat/completions", {**body, "tool_choice": choice})
    assert status == 200, reply


async def test_anthropics_tools_of_the_users_machine(server: Harness) -> None:
    say(server, written("bash", command="ls"))
    tools = [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "memory_20250818", "name": "memory"},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 3},
        {"type": "mcp_toolset", "mcp_server_name": "m"},
        {"name": "look", "input_schema": {"type": "object"}},
    ]
    messages = [{"role": "user", "content": "go"}]
    body = {"messages": messages, "tools": tools, "max_tokens": 200}
    async with server.session.post(f"{server.url}/v1/messages", json=body) as reply:
        assert reply.status == 200
        ignored = reply.headers["X-Ignored-Fields"]
        block = (await reply.json())["content"][-1]
    assert ignored == "tools.mcp_toolset, tools.web_search_20250305"
    assert (block["name"], block["input"]) == ("bash", {"command": "ls"})
    for name in ("bash", "str_replace_based_edit_tool", "memory", "look"):
        assert f'"name": "{name}"' in prompt(server)
    assert "web_search" not in prompt(server)
    choice = {"type": "tool", "name": "web_search"}
    status, error = await server.post("/v1/messages", {**body, "tool_choice": choice})
    assert (status, "tool_choice.name" in error["error"]["message"]) == (400, True)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_tools_of_a_provider_are_left_out_and_named(server: Harness, path: str) -> None:
    content: Body = (
        {"input": "go"} if "resp" in path else {"messages": [{"role": "user", "content": "go"}]}
    )
    body = {**content, "tools": [SEARCH, {"type": "file\nsearch"}]}
    for stream in (False, True):
        async with server.session.post(server.url + path, json={**body, "stream": stream}) as reply:
            assert reply.status == 200
            assert reply.headers["X-Ignored-Fields"] == "tools.filesearch, tools.web_search"
            await reply.read()
    assert "# Tools" not in prompt(server)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "a\\nb"}', "a\nb"),
        ('{"input": "a\\n', "a\n"),
        ('{"input": "a\\', "a"),
        ('{"input": "a\\ud83d\\ude', "a"),
        ('{"input": {"a": 1}}', '{"a":1}'),
        ('{"inp', ""),
        ("", ""),
        ("{}", ""),
    ],
)
async def test_input_that_is_cut_off_is_kept_as_far_as_it_goes(arguments: str, text: str) -> None:
    assert input_text(arguments) == text
