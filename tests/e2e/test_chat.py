"""Chat replies of the running server: what streams adds up to what comes whole, also when the model
writes tags at random."""

from typing import Any

import openai
from server import RunningServer

TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("call", "name", "the")
]


def whole(client: openai.OpenAI, body: dict[str, Any]) -> dict[int, tuple[Any, ...]]:
    reply = client.chat.completions.create(**body)
    return {
        choice.index: (
            choice.message.content or "",
            [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []],
            choice.finish_reason,
            [entry.token for entry in choice.logprobs.content],
        )
        for choice in reply.choices
    }


def streamed(client: openai.OpenAI, body: dict[str, Any]) -> dict[int, tuple[Any, ...]]:
    found: dict[int, tuple[str, dict[int, tuple[str, str]], str | None, list[str]]] = {}
    for chunk in client.chat.completions.create(stream=True, **body):
        for choice in chunk.choices:
            text, calls, _, tokens = found.get(choice.index, ("", {}, None, []))
            for call in choice.delta.tool_calls or []:
                name, arguments = calls.get(call.index, (call.function.name, ""))
                calls[call.index] = name, arguments + call.function.arguments
            if choice.logprobs:
                tokens += [entry.token for entry in choice.logprobs.content]
            text += choice.delta.content or ""
            found[choice.index] = text, calls, choice.finish_reason, tokens
    return {i: (text, [*calls.values()], *rest) for i, (text, calls, *rest) in found.items()}


def test_streams_add_up_to_whole_replies(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    with client:
        for seed in range(5):
            body: dict[str, Any] = {
                "model": "m",
                "messages": [{"role": "user", "content": f"question {seed}"}],
                "tools": TOOLS,
                "max_tokens": 60,
                "seed": seed,
                "n": 2,
                "logprobs": True,
                "logit_bias": {str(token): 4 for token in range(545, 556)},  # the tags
                "extra_body": {"ignore_eos": True},
            }
            assert streamed(client, body) == whole(client, body)


def test_a_reasoning_ends_at_its_budget_and_an_answer_follows(server: RunningServer) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "think"}],
        "max_tokens": 30,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {str(token): -100 for token in range(545, 556)},  # no tags by itself
    }
    replies = []
    for budget in (7, 1000):
        thinking = {"type": "enabled", "budget_tokens": budget}
        status, reply = server.post("/v1/messages", body | {"thinking": thinking})
        assert (status, reply["usage"]["output_tokens"]) == (200, 30)
        replies.append(reply["content"])
    (short, answer), (long,) = replies
    assert (short["type"], answer["type"], long["type"]) == ("thinking", "text", "thinking")
    assert long["thinking"].startswith(short["thinking"])
    assert 0 < len(short["thinking"]) < len(long["thinking"])
    assert answer["text"]
