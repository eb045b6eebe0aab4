"""Structured output through real processes: valid replies, bombs, faults, leaks. Two ranks, with
drafts, are in `test_mtp.py`."""

import json
import os
import re
import signal
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import psutil
import pytest
from schemas import random_schema, read_json
from server import RunningServer, running_server, wait_until

PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 20, "maxLength": 40},
        "values": {"type": "array", "items": {"type": "integer"}, "minItems": 10, "maxItems": 20},
    },
    "required": ["name", "values"],
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "minLength": 1, "maxLength": 12},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "unit": {"enum": ["c", "f"]},
                },
                "required": ["city", "unit"],
            },
        },
    },
    {"type": "function", "function": {"name": "noop"}},
]


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    flags = ("--data_type", "float32", "--max_total_token_num", "32768")
    with running_server(tiny_model, tmp_path_factory.mktemp("structured"), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(server: RunningServer, schema: Any, seed: int) -> tuple[str, str]:
    """Finish reason and text of a reply under a schema."""
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": f"Give me number {seed}"}],
        "max_tokens": 1500,
        "temperature": (0.0, 1.0, 1.5)[seed % 3],
        "seed": seed,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        **PLAIN,
    }
    status, reply = server.post("/v1/chat/completions", body, timeout_s=200)
    assert status == 200, reply
    choice = reply["choices"][0]
    return choice["finish_reason"], choice["message"]["content"]


def check_schemas(server: RunningServer, seeds: range) -> None:
    schemas = [random_schema(seed, free_keys=False) for seed in seeds]
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda pair: ask(server, pair[1], pair[0]), enumerate(schemas)))
    num_long = 0  # noise may repeat a digit of a decimal, or add properties to an open object
    for schema, (reason, text) in zip(schemas, replies, strict=True):
        if reason == "length":
            num_long += 1
            continue
        assert reason == "stop", (schema, text)
        assert jsonschema_rs.validator_for(schema).is_valid(read_json(text)), (schema, text)
    print(f"{len(seeds) - num_long} of {len(seeds)} replies are valid, {num_long} do not end")
    assert num_long <= len(seeds) // 20


def test_replies_are_valid_under_random_schemas(server: RunningServer) -> None:
    check_schemas(server, range(20))


@pytest.mark.slow
def test_replies_are_valid_under_two_hundred_random_schemas(server: RunningServer) -> None:
    check_schemas(server, range(1000, 1200))


def bombs() -> dict[str, dict[str, Any]]:
    """Fields of hostile requests; each name begins with the parameter that must be blamed."""
    refs = {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(3000)}
    ors = [{"anyOf": [{"required": [f"p{n}{k}"]} for k in range(4)]} for n in range(20)]
    rules = "".join(f"r{n}: r{n + 1}\n" for n in range(3000))
    terminals = "".join(f"R{n}: R{n + 1} R{n + 1}\n" for n in range(60))
    endless = {"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}}}
    return {
        "guided_json 300 kB": {"guided_json": {"description": "x" * 300_000}},
        "guided_json a chain of references": {
            "guided_json": {"$ref": "#/$defs/d0", "$defs": {**refs, "d3000": {}}}
        },
        "guided_json combinations": {"guided_json": {"allOf": ors}},
        "guided_json a tiny step": {"guided_json": {"type": "number", "multipleOf": 1e-300}},
        "guided_json giant minItems": {"guided_json": {"type": "array", "minItems": 10**12}},
        "guided_json a loop of references": {"guided_json": {"$ref": "#"}},
        "guided_json no end": {"guided_json": {**endless, "$ref": "#/$defs/n"}},
        "guided_json matches nothing": {"guided_json": {"enum": []}},
        "guided_regex repeats": {"guided_regex": "(a{1000}){1000}"},
        "guided_regex nested repeats": {"guided_regex": "((((a{30}){30}){30}){30})"},
        "guided_regex parentheses": {"guided_regex": "(" * 50_000 + ")" * 50_000},
        "guided_regex optional repeats": {"guided_regex": "(a?){5000}a{5000}"},
        "guided_regex groups": {"guided_regex": "(?:a" * 20_000 + ")?" * 20_000},
        "guided_grammar nested": {"guided_grammar": "root ::= " + "(" * 60_000 + ")" * 60_000},
        "guided_grammar of itself": {"guided_grammar": "root ::= root | root root"},
        "guided_grammar chain": {"guided_grammar": f'start: r0\n{rules}r3000: "x"'},
        "guided_grammar doubling": {"guided_grammar": f'start: R0\n{terminals}R60: "x"'},
        "guided_grammar nested Lark": {"guided_grammar": "start: " + "(" * 60_000 + ")" * 60_000},
        "guided_grammar not": {"guided_grammar": "A: " + "~" * 50_000 + '"a"\nstart: A'},
        "response_format.json_schema.schema not supported": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"uniqueItems": True}},
            }
        },
        "tools[0].function.parameters combinations": {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"allOf": ors}, "strict": True},
                }
            ],
            "tool_choice": "required",
        },
    }


def harmless() -> list[dict[str, Any]]:
    """Fields that look like bombs. The library follows them as far as the output goes."""
    arrays = {"type": "array", "minItems": 1000, "items": {"maxItems": 1000, "type": "array"}}
    twins = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
    twins["d40"] = {"minLength": 1}
    doubling = {"$defs": twins, "properties": {"a": {"$ref": "#/$defs/d0"}}}
    nested: Any = {"type": "null"}
    for _ in range(230):
        nested = {"properties": {"a": nested}, "required": ["a"]}
    return [
        {"guided_json": {"type": "string", "maxLength": 10**9}},
        {"guided_json": {"type": "string", "pattern": "(a{900}){900}"}},
        {"guided_json": {"enum": [f"{n} value" for n in range(15_000)]}},
        {"guided_json": arrays},
        {"guided_json": nested},
        {"guided_json": doubling},
        {"guided_regex": "[^x]{1,100000}"},
    ]


def test_bombs_are_refused_while_a_stream_goes_on(server: RunningServer) -> None:
    lines: list[bytes] = []
    begun = threading.Event()

    def follow() -> None:
        parameters = {"max_new_tokens": 900, "ignore_eos": True}
        data = json.dumps({"inputs": "Hello", "parameters": parameters}).encode()
        request = urllib.request.Request(
            server.url + "/generate_stream", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=200) as reply:
            for line in reply:
                lines.append(line)
                begun.set()

    stream = threading.Thread(target=follow)
    stream.start()
    assert begun.wait(60)
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5, **PLAIN}

    def drop(fields: dict[str, Any]) -> tuple[int, Any]:
        return server.post("/v1/chat/completions", {**body, **fields}, timeout_s=60)

    with ThreadPoolExecutor(2) as pool:  # some take all the time that they may
        replies = list(pool.map(drop, bombs().values()))
    for name, (status, reply) in zip(bombs(), replies, strict=True):
        assert status == 400, (name, status, reply)
        assert reply["error"]["param"] == name.split()[0], (name, reply)
    for fields in harmless():
        status, reply = drop(fields)
        assert status == 200, (fields, reply)
        assert reply["choices"][0]["finish_reason"] in ("length", "stop")
    stream.join(200)
    assert sum(line.startswith(b"data:") for line in lines) == 900
    assert ask(server, {"const": 1}, 1) == ("stop", "1")  # the checker is well


def test_a_checker_that_dies_is_replaced(server: RunningServer) -> None:
    frontend = psutil.Process(server.processes()["frontend-0"])

    def checkers() -> list[int]:
        living = [c for c in frontend.children() if c.status() != psutil.STATUS_ZOMBIE]
        return [c.pid for c in living if "check_child" in " ".join(c.cmdline())]

    assert ask(server, {"const": 2}, 2) == ("stop", "2")
    first = checkers()[0]
    os.kill(first, signal.SIGKILL)
    assert ask(server, {"const": 3}, 3) == ("stop", "3")
    assert first not in checkers()


def test_tools_that_must_be_called_are(client: openai.OpenAI) -> None:
    question: Any = {
        "model": "m",
        "messages": [{"role": "user", "content": "Weather?"}],
        "max_tokens": 400,
        "tools": TOOLS,
        "extra_body": PLAIN,
    }
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    for seed in range(4):
        reply = client.chat.completions.create(**question, tool_choice=named, seed=seed)
        (call,) = reply.choices[0].message.tool_calls or []
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        assert {"city", "unit"} <= arguments.keys() <= {"city", "days", "unit"}
        assert (len(arguments["city"]) >= 1, arguments["unit"] in "cf") == (True, True)
        assert isinstance(arguments.get("days", 1), int)
        assert reply.choices[0].finish_reason == "tool_calls"
    reply = client.chat.completions.create(
        **question, tool_choice="required", parallel_tool_calls=False, seed=9, n=4
    )
    assert [len(choice.message.tool_calls or []) for choice in reply.choices] == [1] * 4
    chunks = client.chat.completions.create(
        **question, tool_choice=named, parallel_tool_calls=False, seed=1, stream=True
    )
    pieces = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    whole = "".join((piece.function and piece.function.arguments) or "" for piece in pieces)
    assert json.loads(whole)["unit"] in ("c", "f")


def test_the_mask_waits_for_the_end_of_reasoning(server: RunningServer) -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 300,
        "seed": 4,
        "logit_bias": {"546": 7},  # </think>, which noise seldom says
        "guided_choice": ["yes", "no"],
    }
    status, reply = server.post("/v1/chat/completions", body)
    assert status == 200
    content = reply["choices"][0]["message"]["content"]
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert re.search(r"</think>(yes|no)$", content)
    assert "<tool_call>" not in content


def test_rows_resume_after_their_workers_die(server: RunningServer) -> None:
    parameters = {"do_sample": True, "seed": 5, "max_new_tokens": 600, "guided_json": SCHEMA}
    undisturbed = server.token_ids("A list:", **parameters)
    with ThreadPoolExecutor(1) as pool:
        first = server.metric("lightllm_generation_tokens_total")
        reply = pool.submit(server.token_ids, "A list:", **parameters)
        wait_until(
            lambda: reply.done() or server.metric("lightllm_generation_tokens_total") > first + 5,
            30,
            "some tokens",
        )
        os.kill(server.processes()["worker-0"], signal.SIGKILL)
        assert reply.result(120) == undisturbed
    wait_until(server.is_ready, 60, "ready again")


def test_aborted_requests_leave_nothing_behind(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    for seed in range(3):
        stream = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "x"}],
            response_format={"type": "json_object"},
            seed=seed,
            stream=True,
            extra_body=PLAIN,
        )
        next(iter(stream))
        stream.close()
    client.close()
    wait_until(lambda: server.metric("lightllm_batch_current_size") == 0, 30, "all aborted")
    assert ask(server, {"const": 4}, 4) == ("stop", "4")
