"""Counting, encoding and decoding over HTTP."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

IDS = Callable[[str], list[int]]


async def test_tokens_counts_with_get_and_post(server: Any, text_ids: IDS) -> None:
    text = "<|user|>What is AI?"
    for method in ("GET", "POST"):
        async with server.session.request(method, server.url + "/tokens", json={"text": text}) as r:
            assert (r.status, await r.json()) == (200, {"ntokens": len(text_ids(text))})


async def test_a_text_there_and_back(server: Any, text_ids: IDS) -> None:
    text = "the <|user|>answer é👍"
    status, reply = await server.post("/tokenize", {"model": "m", "prompt": text})
    ids = text_ids(text)
    assert status == 200
    assert reply == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    _, reply = await server.post("/tokenize", {"prompt": "the answer", "return_token_strs": True})
    assert reply["token_strs"] == ["the", " ", "answer"]
    assert await server.post("/detokenize", {"tokens": ids}) == (200, {"prompt": text})
    assert await server.post("/detokenize", {"tokens": []}) == (200, {"prompt": ""})


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": None}},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"thinking": {"type": "enabled", "clear_thinking": False}},
    ],
)
async def test_a_chat_is_encoded_as_it_would_be_run(server: Any, fields: Any) -> None:
    body = {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "b", "reasoning_content": "because"},
            {"role": "user", "content": "And?"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        **fields,
    }
    _, reply = await server.post("/tokenize", body)
    await server.post("/v1/chat/completions", {**body, "max_tokens": 1})
    assert reply["tokens"] == server.engine.submits[0].prompt_ids
    assert reply["count"] == len(reply["tokens"])


async def test_preserved_thinking_counts_too(start: Any) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "because"},
        {"role": "user", "content": "c"},
    ]
    server = await start(preserve_thinking=True)
    _, reply = await server.post("/tokenize", {"messages": turns})
    assert "because" in server.frontend.tokenizer.decode(reply["tokens"])


BAD: list[tuple[str, Any, str]] = [
    ("/tokens", {}, "text"),
    ("/tokens", {"text": 5}, "text"),
    ("/tokens", {"text": "x" * 5000}, "text"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"prompt": "x" * 5000}, "prompt"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ("/tokenize", {"messages": [{"role": "user"}], "tools": [{}]}, "messages[0].content"),
    (
        "/tokenize",
        {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False},
        "add_generation_prompt",
    ),
    (
        "/tokenize",
        {"messages": [{"role": "user", "content": "x"}], "continue_final_message": True},
        "continue_final_message",
    ),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": "x"}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [1] * 513}, "tokens"),
    ("/detokenize", {"tokens": [584]}, "tokens"),
    ("/detokenize", {"tokens": [2**70]}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "field"), BAD)
async def test_bad_input_is_a_400_that_names_the_field(
    server: Any, path: str, body: Any, field: str
) -> None:
    status, reply = await server.post(path, body)
    assert (status, reply["error"]["param"]) == (400, field), reply


async def test_others_can_build_the_tokenizer(server: Any) -> None:
    status, text = await server.get("/tokenizer_info")
    model_dir = Path(server.frontend.config.model_dir)
    settings = json.loads((model_dir / "tokenizer_config.json").read_text())
    info = json.loads(text)
    assert status == 200
    for key in settings.keys() - {"chat_template"}:
        assert info[key] == settings[key]
    assert "[gMASK]<sop>" in info["chat_template"]
