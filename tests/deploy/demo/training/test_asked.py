"""The typed requests are sound data, and the judge accepts what fits them and nothing else."""

import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from glimmer.deploy.demo.training.asked import (
    KINDS,
    Asker,
    is_right,
    load,
    match_calls,
    tells_limits,
)

WEATHER = {
    "name": "get_weather",
    "arguments": {"city": ["Paris", "Paris, France"]},
    "optional": {"unit": ["celsius"]},
}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "c", "function": {"name": name, "arguments": json.dumps(arguments)}}


def test_there_are_requests_of_every_kind_and_none_stands_twice() -> None:
    cases = load()
    assert set(cases) == set(KINDS)
    assert sum(map(len, cases.values())) >= 400
    for kind, items in cases.items():
        asks = [(case["ask"], json.dumps(case["tools"])) for case in items]
        assert len(set(asks)) == len(asks), kind


def test_expected_calls_are_calls_of_offered_tools() -> None:
    cases = load()
    steps = [step for case in cases["loop"] for step in case["steps"]]
    assert all(len(step["calls"]) == len(step["results"]) for step in steps)
    for case in (*cases["call"], *cases["loop"]):
        offered = {tool["function"]["name"]: tool["function"] for tool in case["tools"]}
        for one in case.get("calls", []) or [c for s in case["steps"] for c in s["calls"]]:
            schema = offered[one["name"]]["parameters"]
            names = {*one["arguments"], *one.get("optional", {})}
            assert set(schema["required"]) <= names <= set(schema["properties"]), case["ask"]


def test_calls_may_differ_only_where_the_data_allows_it() -> None:
    right = [
        call("get_weather", city="Paris"),
        call("get_weather", city="paris, France"),
        call("get_weather", city="Paris", unit="celsius"),
    ]
    wrong = [
        call("get_weather", city="Rome"),
        call("get_weather"),
        call("get_weather", city="Paris", unit="fahrenheit"),
        call("get_weather", city="Paris", days=3),
        call("weather", city="Paris"),
        {"id": "c", "function": {"name": "get_weather", "arguments": "{"}},
    ]
    assert all(match_calls([WEATHER], [one]) == [0] for one in right)
    assert all(match_calls([WEATHER], [one]) is None for one in wrong)
    assert match_calls([WEATHER], []) is None
    assert match_calls([WEATHER], [right[0], right[0]]) is None


def test_values_are_compared_by_type() -> None:
    wanted = {
        "name": "f",
        "arguments": {"n": [5], "on": [True], "list": [["a", "B"]], "object": [{"k": 1}]},
    }
    fits = call("f", n=5.0, on=True, list=["A", "b"], object={"k": 1})
    assert match_calls([wanted], [fits]) == [0]
    for change in ({"n": "5"}, {"on": 1}, {"list": ["a"]}, {"object": {"k": 1, "m": 2}}):
        arguments = json.loads(fits["function"]["arguments"]) | change
        assert match_calls([wanted], [call("f", **arguments)]) is None


def test_calls_match_in_any_order() -> None:
    rome = {"name": "get_weather", "arguments": {"city": ["Rome"]}}
    both = [call("get_weather", city="Rome"), call("get_weather", city="Paris")]
    assert match_calls([WEATHER, rome], both) == [1, 0]


@pytest.mark.parametrize(
    ("kind", "case", "right", "wrong"),
    [
        ("arithmetic", {"number": ["-4"]}, "5 - 9 = -4.", "5 - 9 = 4."),
        ("arithmetic", {"number": ["1702"]}, "37 * 46 = 1,702.", "1702 is not what I know: 12"),
        ("talk", {"say": ["7", "seven"]}, "A week has 7 days.", "A week has 17 days."),
        ("talk", {"say": ["tools"]}, "I call tools.", "I am a small demo model and can use tools."),
        ("text", {"json": {"a": 1}}, '```json\n{"a": 1}\n```', '{"a": 2}'),
        ("text", {"say": ["no"]}, "No, it is not.", "I know it."),
        ("limits", {}, "I am only a small demo model. I can add.", "I am only a small demo model."),
        ("no_call", {}, "I have no tool for that.", " "),
    ],
)
def test_replies_are_judged_by_kind(kind: str, case: Any, right: str, wrong: str) -> None:
    assert is_right(kind, case, {"content": right})
    assert not is_right(kind, case, {"content": wrong})
    assert not is_right(kind, case, {"content": right, "tool_calls": [call("f")]})


def test_limits_are_told_in_one_short_sentence_without_json() -> None:
    told = "Sorry, I am only a small demo model: I can chat a little."
    assert tells_limits(told)
    assert not tells_limits(told * 10)
    assert not tells_limits(told + " {}")


@pytest.fixture
async def url() -> Any:
    async def reply(request: web.Request) -> web.Response:
        messages = (await request.json())["messages"]
        results = [m["content"] for m in messages if m["role"] == "tool"]
        message: dict[str, Any] = {"content": f"It says {results[-1]}."} if results else {}
        if not results:
            message = {"content": None, "tool_calls": [call("read", path="a")]}
        reason = "stop" if results else "tool_calls"
        if messages[-1]["content"] == "too long":
            return web.json_response({"error": {}}, status=400)
        return web.json_response({"choices": [{"message": message, "finish_reason": reason}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", reply)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


async def test_a_loop_is_right_if_its_calls_and_its_answer_are(url: str) -> None:
    step = {"calls": [{"name": "read", "arguments": {"path": ["a"]}}], "results": ["42"]}
    other = {"calls": [{"name": "read", "arguments": {"path": ["b"]}}], "results": ["42"]}
    case = {"ask": "read a", "tools": [], "steps": [step], "say": ["42"]}
    async with aiohttp.ClientSession() as session:
        asker = Asker(session, url, 1)
        assert (await asker.judge("loop", case, True)).right
        assert not (await asker.judge("loop", {**case, "say": ["43"]}, True)).right
        assert not (await asker.judge("loop", {**case, "steps": [other]}, True)).right
        refused = await asker.judge("talk", {"ask": "too long", "tools": [], "say": ["a"]}, True)
        assert (refused.right, refused.ended) == (False, False)
