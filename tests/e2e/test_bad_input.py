"""Bad input against the real server: refused with a 400 that names the field, never a 500, never a
hang, and the next request works. Also clients that leave, and what edges do to the sampler."""

import http.client
import json
import math
import socket
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from server import RunningServer, wait_until

Json = dict[str, Any]
PARAMETERS: Json = {
    "do_sample": True,
    "temperature": 1.5,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.01,
    "seed": 3,
    "n": 1,
    "max_new_tokens": 3,
    "min_new_tokens": 2,
    "ignore_eos": True,
    "logit_bias": {"7": 2.5},
    "allowed_token_ids": [5, 6, 7, 8],
    "stop_sequences": ["zq", [5, 6]],
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "exponential_decay_length_penalty": [2, 1.5],
    "prompt_logprobs": -1,
    "return_details": True,
}
OPENAI: Json = {
    "model": "m",
    "temperature": 1.5,
    "top_p": 0.9,
    "n": 2,
    "max_tokens": 3,
    "min_tokens": 1,
    "stop": ["zq"],
    "stop_token_ids": [9],
    "seed": 3,
    "logit_bias": {"7": 2.5},
    "presence_penalty": 0.5,
    "repetition_penalty": 0.9,
    "stream": False,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "text"},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
MESSAGES: list[Json] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "1", "tool_call_id": "c"},
]
ANTHROPIC: Json = {
    "system": [{"type": "text", "text": "be brief"}],
    "messages": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "enabled", "budget_tokens": 5},
}
ITEMS: list[Json] = [
    {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "1"},
]
BODIES: dict[str, Json] = {
    "/": {"inputs": "hi", "stream": True, "parameters": PARAMETERS},
    "/generate": {"inputs": [5, 6, 7], "parameters": PARAMETERS},
    "/generate_stream": {"inputs": "hi", "parameters": PARAMETERS},
    "/v1/completions": {**OPENAI, "prompt": ["hi", "you"], "logprobs": 2, "echo": False},
    "/v1/chat/completions": {
        **OPENAI,
        "messages": MESSAGES,
        "tools": [TOOL],
        "tool_choice": "auto",
        "logprobs": True,
        "top_logprobs": 2,
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "/tokens": {"text": "hi", "parameters": {"add_special_tokens": True}},
    "/tokenize": {
        "messages": MESSAGES,
        "tools": [TOOL],
        "return_token_strs": True,
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "/detokenize": {"tokens": [5, 6, 7]},
    "/abort_request": {"request_id": "nobody"},
    "/v1/messages": {**ANTHROPIC, "max_tokens": 3, "stop_sequences": ["zq"], "temperature": 1.5},
    "/v1/messages/count_tokens": ANTHROPIC,
    "/v1/responses": {
        "input": ITEMS,
        "instructions": "be brief",
        "max_output_tokens": 3,
        "temperature": 1.5,
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "tool_choice": "auto",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "none"},
        "stream": False,
    },
}
NASTY: list[Any] = [None, True, False, 0, -1, 1, 0.5, -0.0, 1e-40, 1e-300, 1e308, 2**31, 2**63]
NASTY += [
    -(2**63),
    10**30,
    "",
    "x",
    "\x00",
    "\u00e9\U0001f600",
    "\ufffd",
    "a" * 2000,
    "1",
    [],
    {},
    [[]],
]
NASTY += [[None], [-1], [True], [584], [2**31], ["x"] * 2000, {"type": "x"}, {"5": -100}, [{}]]
RAW = [b"NaN", b"-Infinity", b"1e999999", b'"\\ud800"', b'"\xff"', b"[" * 5000, b"", b"01", b"'x'"]


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    return [path, *(p for key, item in inner for p in paths_of(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """`value` with what is at `path` replaced."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def hostile_requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A valid body of some route with one to three places made wrong."""
    route = draw(st.sampled_from(sorted(BODIES)))
    body: Any = BODIES[route]
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths_of(body)[1:] or [()]))
        new = draw(st.sampled_from(NASTY))
        unlimited = path == ("parameters",) or str(path[-1:]).startswith("('max_")
        assume(not (path[-1:] == ("abort_all",) and new))
        assume(not unlimited or not (new is None or isinstance(new, dict)))  # would run for long
        body = replaced(body, path, new)
    data = json.dumps(body).encode()
    match draw(st.integers(0, 9)):
        case 0:
            leaf = draw(st.sampled_from(paths_of(BODIES[route])[1:]))
            marked = json.dumps(replaced(BODIES[route], leaf, "@@")).encode()
            data = marked.replace(b'"@@"', draw(st.sampled_from(RAW)))
        case 1:
            data = data[: draw(st.integers(0, len(data)))]
    return route, data


def post(server: RunningServer, path: str, data: bytes, **headers: str) -> tuple[int, bytes]:
    """Status and body; fails when no answer comes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", path, data, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def check_refusal(status: int, data: bytes) -> str:
    """A refusal has OpenAI's envelope and LightLLM's message, or Anthropic's; the field that it
    names."""
    body = json.loads(data)
    if body.get("type") == "error":
        assert body["request_id"]
        assert body["error"]["type"] == "invalid_request_error"
        return str(body["error"]["message"].partition(": ")[0])
    assert body["error"]["code"] in (status, "context_length_exceeded")
    assert body["message"] == body["error"]["message"] != ""
    return str(body["error"]["param"] or "")


def check_works(server: RunningServer) -> None:
    assert len(server.token_ids([5, 6], max_new_tokens=2, ignore_eos=True)) == 2


def settle(server: RunningServer) -> None:
    """Wait until nothing runs or waits and no page is held, as of a new heartbeat."""
    before = server.metric("glimmer_generated_tokens_total")
    check_works(server)

    def is_idle() -> bool:
        pages = [server.metric(f"glimmer_pages{name}") for name in ("", "_free", "_cached")]
        return (
            server.metric("glimmer_generated_tokens_total") > before
            and server.metric("lightllm_num_running_reqs") == 0
            and server.metric("lightllm_queue_size") == 0
            and pages[0] == pages[1] + pages[2]
        )

    wait_until(is_idle, 20, "nothing runs and no page is held")


def test_the_bodies_that_are_mutated_are_good(server: RunningServer) -> None:
    for route, body in BODIES.items():
        status, data = post(server, route, json.dumps(body).encode())
        assert status == 200, (route, data)


@settings(
    max_examples=500,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(request=hostile_requests())
def test_no_body_is_answered_with_a_500(server: RunningServer, request: tuple[str, bytes]) -> None:
    route, data = request
    status, reply = post(server, route, data)
    assert status in (200, 400), (status, reply[:500])
    if status == 400:
        check_refusal(status, reply)
    else:
        assert b'"stream_error"' not in reply
        assert b"response.failed" not in reply


def test_the_server_still_answers_after_the_fuzz(server: RunningServer) -> None:
    settle(server)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("route", "field", "body"),
    [
        ("/v1/completions", "prompt", {"prompt": [5] * 8192}),
        ("/v1/completions", "prompt", {"prompt": "a b " * 6000}),
        ("/v1/completions", "prompt", {"prompt": "a" * 70_000}),
        ("/v1/completions", "prompt", {"prompt": [-1]}),
        ("/v1/completions", "prompt", {"prompt": [584]}),
        ("/v1/completions", "prompt", {"prompt": [2**63]}),
        ("/v1/completions", "prompt", {"prompt": ""}),
        ("/v1/completions", "stop", {"prompt": "x", "stop": ["x"] * 10_000}),
        ("/v1/completions", "repetition_penalty", {"prompt": "x", "repetition_penalty": 1e-40}),
        ("/v1/chat/completions", "messages", {"messages": []}),
        ("/v1/chat/completions", "messages[0].role", {"messages": [{"content": "x"}]}),
        (
            "/v1/chat/completions",
            "chat_template_kwargs.self",
            {"messages": MESSAGES, "chat_template_kwargs": {"self": 1}},
        ),
    ],
)
def test_streams_are_refused_before_their_200_and_name_the_field(
    server: RunningServer, route: str, field: str, body: Json, stream: bool
) -> None:
    status, reply = post(server, route, json.dumps({**body, "stream": stream}).encode())
    assert status == 400, reply[:300]
    assert check_refusal(status, reply) == field


def test_deep_nesting_wrong_types_and_compressed_bodies(server: RunningServer) -> None:
    for data in (b"[" * 300_000, b'{"inputs":' * 100_000, b"null", b"1", b'"x"', b"{}", b""):
        assert check_refusal(*post(server, "/generate", data)) in ("", "inputs")
    good = json.dumps(BODIES["/generate"]).encode()
    assert post(server, "/generate", good, **{"Content-Type": "text/plain; charset=x"})[0] == 200
    for encoding in ("gzip", "deflate", "br"):  # it is none of these
        refusal = post(server, "/generate", good, **{"Content-Encoding": encoding})
        assert check_refusal(*refusal) == "Content-Encoding"
    check_works(server)


def test_too_large_bodies_are_refused_known_or_chunked(server: RunningServer) -> None:
    status, reply = post(server, "/generate", b" " * (2 << 20))
    assert (status, check_refusal(status, reply)) == (413, "")
    assert b"1.12 MB" in reply  # 1 MB and 16 bytes per token
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
        for _ in range(3):
            client.sendall(chunk)
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    check_works(server)


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    def message(data: bytes) -> bytes:
        return b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
            len(data),
            data,
        )

    good = json.dumps({"inputs": [5], "parameters": {"max_new_tokens": 1}}).encode()
    last = b"GET /liveness HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(message(good) + message(b"{") + message(good) + last)
        received = b""
        while data := client.recv(65536):
            received += data
    statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"400", b"200", b"200"]


@pytest.mark.parametrize("reset", [False, True])
def test_clients_that_leave_at_any_stage_free_everything(
    server: RunningServer, reset: bool
) -> None:
    long = {"max_new_tokens": 5000, "ignore_eos": True}
    whole = {"inputs": [5 + i % 500 for i in range(1500)], "parameters": long}
    stream = {"model": "m", "prompt": [5, 6], "max_tokens": 5000, "ignore_eos": True, "n": 3}

    def leave(path: str, body: Json, sent: int | None = None, read: int = 0) -> None:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            client.sendall((head + data)[:sent])
            if read:
                client.recv(read)
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    leave("/generate", whole, sent=30)  # in the head
    leave("/generate", whole, sent=900)  # in the body
    leave("/generate", whole)  # queued or in prefill
    leave("/v1/completions", {**stream, "stream": True}, read=1000)
    leave("/generate_stream", whole, read=1000)
    for n in range(40):  # more than one step takes in
        leave("/generate", {**whole, "inputs": [5 + n]})
    settle(server)


def test_edges_of_the_ranges_never_make_a_logprob_that_is_no_number(server: RunningServer) -> None:
    edges: list[Json] = [
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100, "temperature": 0},
        {"temperature": 1.1e-5},
        {"temperature": 2, "logit_bias": {"5": 100, "6": -100}},
        {"temperature": 1.1e-5, "logit_bias": {"5": 100}},
        {"top_p": 5e-324},
        {"min_p": 1},
        {"presence_penalty": -2, "frequency_penalty": -2},
        {"allowed_token_ids": [5, 6], "logit_bias": {"5": -100, "6": -99}},
    ]
    for edge in edges:
        body = {"model": "m", "prompt": "hi", "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
        status, reply = server.post("/v1/completions", {**body, **edge})
        assert status == 200, (edge, reply)
        logprobs = reply["choices"][0]["logprobs"]["token_logprobs"]
        assert len(logprobs) == 8, edge
        assert all(v is not None and math.isfinite(v) and v <= 1e-3 for v in logprobs), edge


def test_the_shortest_output_counts_its_end_token_on_generate(server: RunningServer) -> None:
    end = 531  # the tiny model's <|user|>
    forced = {"logit_bias": {str(end): 100}, "max_new_tokens": 9}
    assert server.token_ids([5, 6], **forced) == [end]
    five = server.token_ids([5, 6], min_new_tokens=5, **forced)
    assert (len(five), five.index(end)) == (5, 4)
    body = {"prompt": [5, 6], "temperature": 0, "max_tokens": 9, "min_tokens": 5}
    _, reply = server.post("/v1/completions", {**body, "logit_bias": {str(end): 100}})
    assert reply["usage"]["completion_tokens"] == 6


TOOLS_OF = {
    "/v1/chat/completions": lambda f: {"tools": [{"type": "function", "function": f}]},
    "/v1/responses": lambda f: {"tools": [{"type": "function", **f}]},
    "/v1/messages": lambda f: {"tools": [{"name": f.get("name"), "input_schema": {}}]},
}
PROMPTS: dict[str, Any] = {
    "/generate_stream": lambda text: {"inputs": text},
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/responses": lambda text: {"input": text},
    "/v1/messages": lambda text: {
        "max_tokens": 3,
        "messages": [{"role": "user", "content": text}],
    },
}
STOPS = {"/generate_stream": "stop_sequences", "/v1/messages": "stop_sequences"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", PROMPTS)
def test_each_route_refuses_what_no_server_could_do(
    server: RunningServer, route: str, stream: bool
) -> None:
    """Far too long prompts, a thousand stop strings, images, nameless tools, deep nesting."""

    def refused(body: Json, field: str) -> None:
        data = json.dumps({**body, "stream": stream}).encode()
        status, reply = post(server, route, data)
        assert status == 400, (body.keys(), status, reply[:300])
        assert check_refusal(status, reply).startswith(field), reply[:300]

    good = PROMPTS[route]("hi")
    prompt_field = next(key for key in good if key != "max_tokens")
    # Agents look for Anthropic's words, which name no field.
    is_anthropic = route == "/v1/messages"
    too_long = "prompt is too long" if is_anthropic else prompt_field
    refused(PROMPTS[route]("x " * 200_000), too_long)
    stops = {STOPS.get(route, "stop"): ["x"] * 1000}
    nested = route == "/generate_stream"
    refused(
        {**good, **({"parameters": stops} if nested else stops)}, "parameters" if nested else "stop"
    )
    refused({**good, prompt_field: None}, prompt_field)
    refused({**good, prompt_field: []}, prompt_field)
    if route in TOOLS_OF:
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        refused({**good, prompt_field: image}, f"{prompt_field}[0].content[0]")
        for wrong in ({}, {"name": ""}, {"name": 5}):
            refused({**good, **TOOLS_OF[route](wrong)}, "tools[0]")
        refused({**good, "tool_choice": "always"}, "tool_choice")
        refused({**good, "temperature": 1e9}, "temperature")
    data = json.dumps({**good, "stream": stream}).encode()[:-1] + b',"x":' + b"[" * 200_000
    status, reply = post(server, route, data)
    assert status == 400, reply[:200]
    check_refusal(status, reply)


def test_unknown_models_and_fields_are_no_mistake(server: RunningServer) -> None:
    more = {"model": "gpt-9", "no_such_field": {"a": [1]}, "max_tokens": 2, "max_output_tokens": 2}
    for route, prompt in PROMPTS.items():
        if route != "/generate_stream":
            status, reply = server.post(route, {**prompt("hi"), **more})
            assert (status, reply["model"]) == (200, "gpt-9"), route


def test_methods_and_paths_that_are_not_there(server: RunningServer) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize"):
        status, text = server.get(path)
        assert status == 405, path
        assert "Method Not Allowed" in text
    assert server.get("/v1/nothing")[0] == 404
    assert json.loads(server.get("/v1/messages/nothing")[1])["error"]["type"] == "not_found_error"


def test_nesting_that_json_allows_never_breaks_a_reply(server: RunningServer) -> None:
    """Up to the depth where the parser gives up; what is repeated in replies is nested deeper."""
    hello = [{"role": "user", "content": "hi"}]
    use = {"type": "tool_use", "id": "x", "name": "f", "input": "@@"}
    turns = [{"role": "assistant", "content": [use]}, *hello]
    openai_tool = {"type": "function", "function": {"name": "f", "parameters": "@@"}}
    responses_tool = {"type": "function", "name": "f", "parameters": "@@"}
    bodies = [
        ("/v1/responses", {"input": "x", "max_output_tokens": 1, "metadata": {"a": "@@"}}),
        ("/v1/responses", {"input": "x", "stream": True, "text": {"format": "@@"}}),
        ("/v1/chat/completions", {"messages": hello, "max_tokens": 1, "metadata": "@@"}),
    ]
    longer = [  # their prompts grow with the depth
        ("/v1/responses", {"input": "x", "max_output_tokens": 1, "tools": [responses_tool]}),
        ("/v1/messages", {"messages": turns, "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": hello, "max_tokens": 1, "tools": [openai_tool]}),
        ("/tokenize", {"messages": hello, "tools": [openai_tool]}),
    ]
    cases = [(depth, bodies) for depth in (50, *range(900, 1000, 3))]
    cases += [(depth, longer) for depth in (50, 500, 985)]
    for depth, bodies in cases:
        nested = b'{"a":' * depth + b"1" + b"}" * depth
        for route, body in bodies:
            for stream in (False, True):
                data = json.dumps({**body, "stream": stream}).encode().replace(b'"@@"', nested)
                status, reply = post(server, route, data)
                assert status in (200, 400), (route, depth, reply[:300])
                assert b"stream_error" not in reply, (route, depth)
