import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from glimmer.deploy.demo.training.evaluate import (
    Case,
    call_cases,
    evaluate_lengths,
    judge,
    no_call_cases,
    result_cases,
    retrieval_cases,
)


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": json.dumps(arguments)}}


def wanted_calls(case: Case, kind: str) -> list[dict[str, Any]]:
    from glimmer.deploy.demo.training.dialogues import dialogue

    for number in range(500):
        item = dialogue(f"evaluation-{number}", True, kind)
        if item.messages[: item.first_reply] == case.messages:
            calls = item.messages[item.first_reply]["tool_calls"]
            return [call(c["function"]["name"], c["function"]["arguments"]) for c in calls]
    raise AssertionError("not one of the held-out dialogues")


def test_calls_must_be_right_in_name_and_every_argument() -> None:
    for kind, count in (("call", 1), ("parallel", 2)):
        for case in call_cases(kind, 5, count):
            calls = wanted_calls(case, kind)
            assert len(calls) == count
            assert case.is_right({"tool_calls": calls[::-1]})
            turned = [
                call(
                    c["function"]["name"],
                    dict(reversed(json.loads(c["function"]["arguments"]).items())),
                )
                for c in calls
            ]
            assert case.is_right({"tool_calls": turned})
            assert not case.is_right({"tool_calls": calls[:-1]})
            assert not case.is_right({"tool_calls": None, "content": "no"})
            changed = json.loads(calls[0]["function"]["arguments"]) | {"extra": 1}
            wrong = [call(calls[0]["function"]["name"], changed), *calls[1:]]
            assert not case.is_right({"tool_calls": wrong})


def test_no_call_means_none() -> None:
    case = no_call_cases(1)[0]
    assert case.is_right({"content": "I have no tool."})
    assert not case.is_right({"tool_calls": [call("f", {})]})


def test_answers_must_hold_what_tools_or_texts_say() -> None:
    for case in (*result_cases(5), *retrieval_cases(2)):
        assert not case.is_right({"content": "I do not know."})
        assert not case.is_right({"content": None})
    case = retrieval_cases(1)[0]
    text = "".join(message["content"] for message in case.messages)
    assert case.is_right({"content": text})
    assert len(text.split()) > 1300


@pytest.fixture
async def url(request: pytest.FixtureRequest) -> Any:
    async def reply(request: web.Request) -> web.Response:
        body = await request.json()
        assert body["temperature"] == 0
        thinking = body["chat_template_kwargs"]["enable_thinking"]
        message = {"content": "yes" if thinking else None, "tool_calls": None}
        reason = "stop" if thinking else "length"
        choices = [{"message": message, "finish_reason": reason}]
        return web.json_response({"choices": choices, "usage": {"prompt_tokens": 12}})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", reply)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


async def test_early_facts_are_asked_by_length(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await evaluate_lengths(url, 2, 2, [50, 100])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [["50", "12", "0.000", "0.000"], ["100", "12", "0.000", "0.000"]]
    short, long = (retrieval_cases(1, words)[0] for words in (50, 5000))
    assert len(str(long.messages)) > 20 * len(str(short.messages))


async def test_shares_of_right_and_of_ended_replies(url: str) -> None:
    cases = [Case([], [], lambda reply, n=n: n == 0) for n in range(4)]  # type: ignore[misc]
    assert await judge(url, cases, True, 2) == (0.25, 1.0, 12.0)
    assert await judge(url, cases, False, 2) == (0.25, 0.0, 12.0)
