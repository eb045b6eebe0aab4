"""Thinking budgets on the chat routes: fields of the request, the server's default and maximum."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
HELLO: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}]},
    MESSAGES: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50},
    RESPONSES: {"input": "Hello"},
}
DEFAULT, MOST = {"thinking_token_budget": 40}, {"max_thinking_token_budget": 60}
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
START = Callable[..., Awaitable[Any]]


@pytest.mark.parametrize(
    ("flags", "path", "fields", "budget"),
    [
        ({}, CHAT, {}, -1),
        ({}, CHAT, {"thinking_token_budget": 7}, 7),
        ({}, CHAT, {"thinking_token_budget": 0}, 0),
        ({}, CHAT, {"thinking": {"type": "enabled", "budget_tokens": 9}}, 9),
        (DEFAULT, CHAT, {}, 40),
        (DEFAULT, CHAT, {"thinking_token_budget": 100}, 100),
        (DEFAULT, CHAT, {"thinking_token_budget": -1}, -1),
        (DEFAULT, CHAT, {"thinking_token_budget": 7, **OFF}, -1),
        (DEFAULT | MOST, CHAT, {}, 40),
        (DEFAULT | MOST, CHAT, {"thinking_token_budget": 100}, 60),
        (DEFAULT | MOST, CHAT, {"thinking_token_budget": -1}, 60),
        (MOST, CHAT, {}, 60),
        ({}, MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, 1024),
        (MOST, MESSAGES, {"thinking": {"type": "adaptive"}}, 60),
        (DEFAULT, MESSAGES, {}, -1),
        ({}, RESPONSES, {"thinking_token_budget": 7}, 7),
        ({}, RESPONSES, {"reasoning": {"max_tokens": 8}}, 8),
        (DEFAULT, RESPONSES, {"reasoning": {"effort": "none"}}, -1),
    ],
)
async def test_the_budget_of_a_request(
    start: START, flags: dict[str, Any], path: str, fields: dict[str, Any], budget: int
) -> None:
    server = await start(**flags)
    status, _ = await server.post(path, HELLO[path] | fields)
    assert status == 200
    [submit] = server.engine.submits
    end_id = server.frontend.tokenizer.vocabulary.added_ids["</think>"]
    found = submit.sampling.thinking_budget, submit.sampling.thinking_end_id
    assert found == ((budget, end_id) if budget >= 0 else (-1, -1))


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        (CHAT, {"thinking_token_budget": -2}, "thinking_token_budget"),
        (CHAT, {"thinking_token_budget": "8"}, "thinking_token_budget"),
        (CHAT, {"thinking": {"type": "enabled", "budget_tokens": 1.5}}, "thinking.budget_tokens"),
        (RESPONSES, {"reasoning": {"max_tokens": 2**31}}, "reasoning.max_tokens"),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ],
)
async def test_wrong_budgets_are_refused_by_name(
    server: Any, path: str, fields: dict[str, Any], name: str
) -> None:
    status, reply = await server.post(path, HELLO[path] | fields)
    assert status == 400
    assert name in reply["error"]["message"]
