"""Bodies are refused by the name of the field that is wrong, with its limit."""

import contextlib
import json
from typing import Any

import pytest
from glimmer.frontend.wire.body import decode_body
from glimmer.frontend.wire.schema import ChatBody, CompletionBody, GenerateBody
from glimmer.shared.errors import RequestError
from hypothesis import given
from hypothesis import strategies as st

CHAT = {"messages": [{"role": "user", "content": "x"}]}
WRONG: list[tuple[type, dict[str, Any], str]] = [
    (GenerateBody, {}, "inputs"),
    (GenerateBody, {"inputs": None}, "inputs"),
    (GenerateBody, {"inputs": 5}, "inputs"),
    (GenerateBody, {"inputs": [1, "a"]}, "inputs[1]"),
    (GenerateBody, {"inputs": [True]}, "inputs[0]"),
    (GenerateBody, {"inputs": [1.5]}, "inputs[0]"),
    (GenerateBody, {"inputs": "x", "parameters": []}, "parameters"),
    (GenerateBody, {"inputs": "x", "multimodal_params": 1}, "multimodal_params"),
    (ChatBody, {}, "messages"),
    (ChatBody, {"messages": "x"}, "messages"),
    (ChatBody, {"messages": [5]}, "messages[0]"),
    (ChatBody, {**CHAT, "tools": {}}, "tools"),
    (ChatBody, {**CHAT, "chat_template_kwargs": []}, "chat_template_kwargs"),
    (
        ChatBody,
        {**CHAT, "stream_options": {"include_usage": "yes"}},
        "stream_options.include_usage",
    ),
    (ChatBody, {**CHAT, "logprobs": 3}, "logprobs"),
    (ChatBody, {**CHAT, "top_logprobs": 21}, "top_logprobs"),
    (ChatBody, {**CHAT, "model": 7}, "model"),
    (ChatBody, {**CHAT, "model": "m" * 300}, "model"),
    (CompletionBody, {"model": "m"}, "prompt"),
    (CompletionBody, {"prompt": {}}, "prompt"),
    (CompletionBody, {"prompt": [1.5]}, "prompt[0]"),
    (CompletionBody, {"prompt": [True]}, "prompt[0]"),
    (CompletionBody, {"prompt": "x", "logprobs": True}, "logprobs"),
    (CompletionBody, {"prompt": "x", "echo": "yes"}, "echo"),
]
PARAMETERS: dict[str, list[Any]] = {
    "do_sample": ["yes", 1],
    "temperature": [-0.1, "1", True, 1e30, [1]],
    "top_p": [-1, 1.01, "x"],
    "top_k": [-2, 1.5, 2**40, True],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 101, 1e-40, 1e-300],
    "presence_penalty": [-101, 101, "x"],
    "frequency_penalty": [-101, 101, None.__class__.__name__],
    "n": [0, 9, 16384, True, 1.5],
    "best_of": [0, 9],
    "seed": [-2, 2**63, "x", 1.5],
    "ignore_eos": ["no"],
    "logit_bias": [
        {"-1": 1},
        {"x": 1},
        {"1": "x"},
        {"1": 1e9},
        {str(2**40): 1},
        {str(i): 0 for i in range(1025)},
        [1],
    ],
    "allowed_token_ids": [[-1], ["x"], [True], [1.5], [5] * (1 << 20 | 1), 5],
    "skip_special_tokens": [1],
}
GENERATE: dict[str, list[Any]] = {
    "repetition_penalty": [0.99],
    "presence_penalty": [-0.1],
    "input_penalty": [3],
    "exponential_decay_length_penalty": [[1], [1, 0.5], [-1, 1.0], "x"],
    "max_new_tokens": [0, -1, 10**12, "x", True],
    "min_new_tokens": [0],
    "stop_sequences": [
        ["x"] * 10_000,
        [["x"]],
        [[]],
        [[-1]],
        [[1] * 257],
        "x" * 1025,
        ["x" * 1025],
        5,
        {},
    ],
    "add_special_tokens": ["x"],
    "add_spaces_between_special_tokens": ["x"],
    "print_eos_token": [1],
    "prompt_logprobs": [-2, 1025, True],
    "disable_prompt_cache": [0],
    "return_details": ["x"],
}
OPENAI: dict[str, list[Any]] = {
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "max_tokens": [-1, 10**12, "x", True],
    "min_tokens": [-1],
    "stop": [["x"] * 10_000, "x" * 1025, [5], [[1]], 7],
    "stop_token_ids": [[-1], [True], [2**40], list(range(1025))],
    "stream": ["x", 1],
    "response_format": ["json"],
    "cache_salt": ["x" * 257, 1],
}


def refused(kind: type, data: bytes) -> RequestError:
    with pytest.raises(RequestError) as failure:
        decode_body(data, kind)
    return failure.value


@pytest.mark.parametrize(("kind", "body", "field"), WRONG)
def test_the_wrong_field_is_named(kind: type, body: dict[str, Any], field: str) -> None:
    error = refused(kind, json.dumps(body).encode())
    assert error.field == field
    assert str(error).startswith(field)
    assert len(str(error)) < 300


@pytest.mark.parametrize("name", [*PARAMETERS, *GENERATE])
def test_generate_parameters_have_types_and_limits(name: str) -> None:
    for value in PARAMETERS.get(name, []) + GENERATE.get(name, []):
        body = {"inputs": "x", "parameters": {name: value}}
        error = refused(GenerateBody, json.dumps(body).encode())
        assert str(error.field).startswith(f"parameters.{name}"), value


@pytest.mark.parametrize("name", [*PARAMETERS, *OPENAI])
def test_openai_parameters_have_types_and_limits(name: str) -> None:
    for value in PARAMETERS.get(name, []) + OPENAI.get(name, []):
        data = json.dumps({**CHAT, "prompt": "x", name: value}).encode()
        assert str(refused(ChatBody, data).field).startswith(name), value
        assert str(refused(CompletionBody, data).field).startswith(name), value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"inputs": "x", "parameters": {"temperature": NaN}}',
        b'{"inputs": "x", "parameters": {"temperature": Infinity}}',
        b'{"inputs": "\xff\xfe"}',
        b'{"inputs": "x"} trailing',
        b'{"unknown": ' + b"[" * 200_000,
        b'{"unknown": ' + b"[" * 200_000 + b"]" * 200_000 + b', "inputs": "x"}',
    ],
)
def test_what_is_not_json_is_refused(data: bytes) -> None:
    assert "JSON" in str(refused(GenerateBody, data))


def test_numbers_beyond_float_are_refused() -> None:
    data = b'{"inputs": "x", "parameters": {"temperature": 1e999}}'
    assert refused(GenerateBody, data).field == "parameters.temperature"
    assert refused(GenerateBody, b"[]").field is None


def test_null_means_not_given_and_unknown_keys_are_ignored() -> None:
    names = [*PARAMETERS, *GENERATE]
    body = {"inputs": "x", "new": 1, "parameters": {**dict.fromkeys(names), "whatever": {"x": 1}}}
    assert decode_body(json.dumps(body).encode(), GenerateBody).parameters is not None
    chat = {**CHAT, **dict.fromkeys([*PARAMETERS, *OPENAI]), "user": "u", "metadata": {}}
    assert decode_body(json.dumps(chat).encode(), ChatBody).temperature is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@given(
    st.dictionaries(st.sampled_from(["inputs", "messages", "prompt", *PARAMETERS, *OPENAI]), JSON)
)
def test_any_json_is_a_body_or_a_request_error(body: dict[str, Any]) -> None:
    data = json.dumps({**body, "parameters": body}).encode()
    for kind in (GenerateBody, ChatBody, CompletionBody):
        with contextlib.suppress(RequestError):
            assert isinstance(decode_body(data, kind), kind)
