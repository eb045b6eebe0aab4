"""Sessions go on after whatever other servers, models and tools have left in them."""

import json
from typing import Any

import pytest

from ..conftest import Harness

pytestmark = pytest.mark.asyncio(loop_scope="module")
Body = dict[str, Any]
IMAGE: Body = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "x"},
}
SEARCH: Body = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"q": "x"}}
HITS: Body = {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"type": "hit"}]}
RESULT: Body = {"type": "tool_result", "tool_use_id": "t"}

MESSAGES: list[tuple[str, Any, str]] = [
    (
        "assistant",
        [{"type": "text", "text": "a"}, SEARCH, HITS],
        "a\n[server_tool_use omitted: web_search]\n[hit omitted]",
    ),
    ("assistant", [{"type": "tool_use"}], "<tool_call>unknown</tool_call>"),
    (
        "assistant",
        [{"type": "tool_use", "id": "1", "name": "f", "input": '{"cut'}],
        '<arg_value>{"cut',
    ),
    ("assistant", [{"type": "redacted_thinking", "data": "zzz"}], "<|assistant|></think><|user|>"),
    ("assistant", [{"type": "compaction", "content": "so far"}], "so far"),
    ("user", [IMAGE, {"type": "text", "text": "look"}], "[image omitted]\nlook"),
    ("user", [{"type": "document", "source": {"type": "url", "url": "x"}}], "[document omitted]"),
    ("user", [{"type": "container_upload", "file_id": "f"}], "[container_upload omitted]"),
    ("user", [{"type": "text"}], "[text omitted]"),
    ("user", [{**RESULT, "content": [IMAGE]}], "<tool_response>[image omitted]</tool_response>"),
    ("user", [{**RESULT, "content": 5}], "<tool_response>5</tool_response>"),
    ("user", [{"type": "tool_result", "content": "x"}], "<tool_response>x</tool_response>"),
    (
        "user",
        [{**RESULT, "content": [{"type": "tool_reference", "tool_name": "g"}]}],
        "[tool omitted: g]",
    ),
]
OUTPUTS: list[tuple[Body, str]] = [
    (
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": "cu'},
        '<arg_value>{"a": "cu',
    ),
    (
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": 5},
        "<arg_value>5</arg_value>",
    ),
    ({"type": "function_call"}, "[function_call omitted]"),
    ({"type": "function_call_output", "output": "x"}, "<tool_response>x</tool_response>"),
    (
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]},
        "[image omitted]",
    ),
    (
        {"type": "custom_tool_call", "call_id": "1", "name": "apply_patch", "input": "{}"},
        "<tool_call>apply_patch<arg_key>input</arg_key><arg_value>{}",
    ),
    ({"type": "custom_tool_call_output", "call_id": "1", "output": "done"}, "<tool_response>done"),
    (
        {"type": "local_shell_call", "call_id": "1", "action": {"type": "exec", "command": ["ls"]}},
        '<tool_call>local_shell<arg_key>command</arg_key><arg_value>["ls"]',
    ),
    ({"type": "local_shell_call_output", "id": "1", "output": "files"}, "<tool_response>files"),
    ({"type": "web_search_call", "id": "w", "status": "completed"}, "[web_search_call omitted]"),
    ({"type": "mcp_list_tools", "server_label": "m", "tools": []}, "[mcp_list_tools omitted]"),
    ({"type": "mcp_call", "name": "find", "output": "found"}, "found"),
    ({"type": "image_generation_call", "result": "x" * 99}, "[image_generation_call omitted]"),
    ({"type": "compaction", "encrypted_content": "x"}, "[compaction omitted]"),
    (
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        "<|assistant|></think><|user|>",
    ),
    ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "[image omitted]"),
    ({"role": "assistant", "content": [{"type": "output_audio"}]}, "[output_audio omitted]"),
]


async def prompt(server: Harness, route: str, body: Body) -> str:
    status, reply = await server.post(route, body)
    assert status == 200, reply
    return server.frontend.tokenizer.decode(server.engine.submits.pop().prompt_ids)


@pytest.mark.parametrize(("role", "content", "expected"), MESSAGES)
async def test_blocks_of_others(
    module_server: Harness, role: str, content: Any, expected: str
) -> None:
    new = {"role": "user", "content": "new"}
    body = {"messages": [{"role": role, "content": content}, new], "max_tokens": 3}
    assert expected in await prompt(module_server, "/v1/messages", body)
    async with module_server.session.post(
        f"{module_server.url}/v1/messages", json={**body, "stream": True}
    ) as reply:
        assert b"message_stop" in await reply.read()


@pytest.mark.parametrize(("item", "expected"), OUTPUTS)
async def test_items_of_others(module_server: Harness, item: Body, expected: str) -> None:
    body = {"input": [item, {"role": "user", "content": "new"}], "max_output_tokens": 3}
    assert expected in await prompt(module_server, "/v1/responses", body)


@pytest.mark.parametrize("half", [rb"\ud83d", rb"\uDE00", rb"\ud83d\ud83d\ude00", b"\xed\xa0\xbd"])
@pytest.mark.parametrize(
    "route", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"]
)
async def test_half_a_surrogate_pair_is_a_replacement_character(
    module_server: Harness, route: str, half: bytes
) -> None:
    field = {"/v1/responses": "input", "/v1/completions": "prompt"}.get(route)
    body = {field: "xHALF"} if field else {"messages": [{"role": "user", "content": "xHALF"}]}
    limit = "max_output_tokens" if field == "input" else "max_tokens"
    data = json.dumps({**body, limit: 3}).encode().replace(b"HALF", half + rb" \\ud83d")
    async with module_server.session.post(module_server.url + route, data=data) as reply:
        assert reply.status == 200, await reply.text()
    ids = module_server.engine.submits.pop().prompt_ids
    text = module_server.frontend.tokenizer.decode(ids)
    assert "x\ufffd" in text
    assert r" \ud83d" in text, "this one is spelled by the text itself"


async def test_bytes_that_are_no_text_are_still_refused(module_server: Harness) -> None:
    for data in (
        b'{"prompt": "\xff"}',
        b'{"prompt": "\xed"}',
        b'{"prompt": "\\ud8"}',
        b'{"prompt": ',
    ):
        async with module_server.session.post(
            module_server.url + "/v1/completions", data=data
        ) as reply:
            assert reply.status == 400
            assert "not valid JSON" in await reply.text()
