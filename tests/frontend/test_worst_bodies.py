"""The bodies that cost most per byte, for each route: refused or served, and nobody else waits.

A block of the event loop is measured in CPU time of this process. That includes threads, because
they can keep the loop from running, and excludes other programs of this machine.
"""

import asyncio
import io
import time
from collections.abc import Callable
from typing import Any

import pytest
from glimmer.shared.messages import Ready

LONGEST = 202_752  # tokens, as of GLM-4.7-Flash
LIMIT_S = 0.1
SIZE = 4_000_000  # just below the limit of a body
ATTEMPTS = 3  # the best counts: a block is there each time, a disturbance is not
CHAT = "/v1/chat/completions"


def filled(start: str, unit: str, end: str, count: int | None = None) -> bytes:
    """`unit` so often that the body has almost SIZE bytes, or `count` times."""
    count = count or (SIZE - len(start) - len(end)) // len(unit)
    return (start + unit * count + end).encode()


def user(more: str) -> str:
    return '{"messages":[{"role":"user","content":"x"}' + more


BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "ids of digits": ("/generate", lambda: filled('{"inputs":[', "1,", "1]}")),
    "as many ids as are read": ("/generate", lambda: filled('{"inputs":[', "1,", "1]}", 300_000)),
    "ids of a full request": ("/generate", lambda: filled('{"inputs":[', "500,", "1]}", 202_000)),
    "ids of prompts": ("/v1/completions", lambda: filled('{"prompt":[', "[1,2,3],", "[1]]}")),
    "ids of prompts times n": (
        "/v1/completions",
        lambda: filled('{"n":8,"prompt":[', f"[{'1,' * 2000}1],", "[1]]}", 120),
    ),
    "ids with echo": (
        "/v1/completions",
        lambda: filled('{"echo":true,"prompt":[', "500,", "1]}", 202_000),
    ),
    "allowed ids of many prompts": (
        "/v1/completions",
        lambda: filled(
            '{"allowed_token_ids":[', "1,", '1],"prompt":[' + '"x",' * 900 + '"x"]}', 9**5
        ),
    ),
    "stop strings of many prompts": (
        "/v1/completions",
        lambda: filled(
            '{"n":8,"prompt":[' + '"x",' * 99 + '"x"],"stop":[',
            '"' + "ab" * 400 + '",',
            '"x"]}',
            63,
        ),
    ),
    "long text": ("/v1/completions", lambda: filled('{"prompt":"', "ab, ", '"}')),
    "text that fits": ("/v1/completions", lambda: filled('{"prompt":"', "ab, ", '"}', 400_000)),
    "one long word": ("/v1/completions", lambda: filled('{"prompt":"', "a", '"}', 1_600_000)),
    "escapes": ("/generate", lambda: filled('{"inputs":"', "\\u00e9", '"}')),
    "pairs of escapes": ("/generate_stream", lambda: filled('{"inputs":"', "\\ud83d\\ude00", '"}')),
    "quotes": ("/", lambda: filled('{"inputs":"x"', '""', "}")),
    "unknown fields": ("/generate", lambda: filled('{"inputs":"x","y":[', "{},", "1]}")),
    "floats": (CHAT, lambda: filled(user('],"metadata":{"a":['), "1.2345678e10,", "1]}}")),
    "objects": (CHAT, lambda: filled(user('],"metadata":{"a":['), '{"a":1},', "1]}}", 24_000)),
    "members": (CHAT, lambda: filled(user('],"metadata":{"a":{'), '"ab":1,', '"b":1}}}', 49_000)),
    "too many objects": (CHAT, lambda: filled(user('],"metadata":{"a":['), "{},", "1]}}")),
    "deep": (CHAT, lambda: filled(user('],"metadata":'), '{"a":', "1}", 40_000)),
    "template arguments": (
        CHAT,
        lambda: filled(user('],"chat_template_kwargs":{"a":['), '{"a":1},', "1]}}", 24_000),
    ),
    "messages": (
        CHAT,
        lambda: filled(user(""), ',{"role":"user","content":"x"}', "]}", 9_999),
    ),
    "parts of messages": (
        CHAT,
        lambda: filled(
            '{"messages":[{"role":"user","content":["x"',
            ',{"type":"text","text":""}',
            "]}]}",
            16_000,
        ),
    ),
    "long messages": (
        CHAT,
        lambda: filled(user(""), ',{"role":"user","content":"' + "ab, " * 900 + '"}', "]}", 400),
    ),
    "calls": (
        CHAT,
        lambda: filled(
            user(',{"role":"assistant","tool_calls":['),
            '{"function":{"name":"a","arguments":"{}"}},',
            '{"function":{"name":"a"}}]}]}',
            9_900,
        ),
    ),
    "arguments in one string": (
        CHAT,
        lambda: filled(
            user(',{"role":"assistant","tool_calls":[{"function":{"name":"a","arguments":"'),
            "[],",
            '"}}]}]}',
        ),
    ),
    "arguments in strings": (
        CHAT,
        lambda: filled(
            user(',{"role":"assistant","tool_calls":['),
            '{"function":{"name":"a","arguments":"{\\"a\\":[' + "{}," * 6000 + '1]}"}},',
            '{"function":{"name":"a"}}]}]}',
            200,
        ),
    ),
    "tools": (
        CHAT,
        lambda: filled(
            user('],"tools":['),
            '{"type":"function","function":{"name":"a","parameters":{"a":[' + "{}," * 40 + "1]}}},",
            '{"type":"function","function":{"name":"b"}}]}',
            1000,
        ),
    ),
    "schema": (
        CHAT,
        lambda: filled(user('],"guided_json":{"enum":['), '{"a":1},', "1]}}", 24_000),
    ),
    "schema in a string": (
        CHAT,
        lambda: filled(user('],"guided_json":"['), "{},", '1]"}'),
    ),
    "choices": (CHAT, lambda: filled(user('],"guided_choice":['), '"ab",', '"b"]}', 300_000)),
    "blocks": (
        "/v1/messages",
        lambda: filled(
            '{"max_tokens":1,"messages":[{"role":"user","content":[',
            '{"type":"text","text":"x"},',
            '{"type":"text","text":"x"}]}]}',
            9_990,
        ),
    ),
    "counted blocks": (
        "/v1/messages/count_tokens",
        lambda: filled(
            '{"messages":[{"role":"user","content":[',
            '{"type":"text","text":"' + "ab, " * 30 + '"},',
            '{"type":"text","text":"x"}]}]}',
            9_990,
        ),
    ),
    "items": (
        "/v1/responses",
        lambda: filled(
            '{"input":[',
            '{"role":"user","content":"x"},{"role":"assistant","content":"x"},',
            '{"role":"user","content":"x"}]}',
            4_990,
        ),
    ),
    "calls that are joined": (
        "/v1/responses",
        lambda: filled(
            '{"input":[',
            '{"type":"function_call","call_id":"a","name":"b","arguments":"{}"},',
            '{"role":"user","content":"x"}]}',
            9_900,
        ),
    ),
    "counted text": ("/tokens", lambda: filled('{"text":"', "ab, ", '"}', 400_000)),
    "tokenized text": (
        "/tokenize",
        lambda: filled('{"return_token_strs":true,"prompt":"', "ab, ", '"}', 200_000),
    ),
    "text of ids": ("/detokenize", lambda: filled('{"tokens":[', "500,", "1]}", 202_000)),
    "a name": ("/abort_request", lambda: filled('{"request_id":"', "x", '"}')),
}


class Watchdog:
    """Notes the longest time for which this event loop did not run."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def run(self) -> None:
        last = time.process_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.process_time()
            self.longest_s = max(self.longest_s, now - last)
            last = now


async def play(engine: Any) -> None:
    """End every request with one token. In small groups: the engine is in this process, too."""
    engine.manual = True
    num_ended = 0
    while True:
        for submit in engine.submits[num_ended : num_ended + 10]:
            engine.finish(submit, "length", 1)
            num_ended += 1
        await asyncio.sleep(0.001)


async def longest_block(server: Any, path: str, body: bytes) -> tuple[int, float]:
    """The status of the reply, and the longest block of the loop meanwhile, in seconds."""
    watchdog = Watchdog()
    watch = asyncio.create_task(watchdog.run())
    async with server.session.post(server.url + path, data=io.BytesIO(body)) as reply:
        await reply.read()
    watch.cancel()
    return reply.status, watchdog.longest_s


@pytest.mark.parametrize("name", BODIES)
async def test_no_body_blocks_the_loop(start: Any, name: str) -> None:
    server = await start(max_body_mb=None, max_req_total_len=LONGEST)
    server.engine.send(Ready("scheduler", 0, 0, 100, LONGEST))
    client = server.frontend.client
    await server.settle(lambda: client.max_req_total_len == LONGEST)
    engine = asyncio.create_task(play(server.engine))
    path, make = BODIES[name]
    body = make()
    await server.post("/generate", {"inputs": "x"})
    blocks = []
    for _ in range(ATTEMPTS):
        status, block_s = await longest_block(server, path, body)
        assert status in (200, 400, 413), status
        blocks.append(block_s)
        if block_s < LIMIT_S:
            break
    print(f"{name}: {len(body) / 1e6:.2f} MB, status {status}, blocked {min(blocks) * 1e3:.0f} ms")
    assert min(blocks) < LIMIT_S
    await server.settle(lambda: server.frontend.num_open == 0)
    assert server.frontend.connections.budget.held == 0
    engine.cancel()
