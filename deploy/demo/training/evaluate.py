"""Judges a running server with the demo model on held-out dialogues, over HTTP, greedy.

glimmer demo --port 8000 &
python -m glimmer.deploy.demo.training.evaluate --url http://localhost:8000
"""

import argparse
import asyncio
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from .dialogues import dialogue
from .questions import LONG_TEXT_WORDS, retrieval
from .words import Source

Json = dict[str, Any]
_MAX_TOKENS = 400
_EARLY = 0.1  # the fact stands in this first part of the text


@dataclass(frozen=True)
class Case:
    """A request and whether its reply (the message, and why it ended) is right."""

    messages: list[Json]
    tools: list[Json]
    is_right: Callable[[Json], bool]


def call_cases(kind: str, count: int, num_calls: int) -> list[Case]:
    """Held-out dialogues whose reply is `num_calls` calls: names and all arguments must be right,
    in any order."""
    cases: list[Case] = []
    for one in _dialogues(kind):
        reply = one.messages[one.first_reply]
        wanted = [c["function"] for c in reply.get("tool_calls", [])]
        if len(wanted) == num_calls and len(cases) < count:
            cases.append(Case(one.messages[: one.first_reply], one.tools, _calls(wanted)))
        if len(cases) == count:
            break
    return cases


def no_call_cases(count: int) -> list[Case]:
    """None of the tools fits: the reply must hold no call."""
    made = [dialogue(f"evaluation-{n}", True, "no_call") for n in range(count)]
    return [
        Case(d.messages[: d.first_reply], d.tools, lambda reply: not reply.get("tool_calls"))
        for d in made
    ]


def result_cases(count: int) -> list[Case]:
    """Tools have answered: the reply must say every value they gave."""
    cases: list[Case] = []
    for one in _dialogues("result"):
        if one.must_say:
            cases.append(Case(one.messages[:-1], one.tools, _says(one.must_say)))
        if len(cases) == count:
            break
    return cases


def retrieval_cases(count: int) -> list[Case]:
    """A fact near the beginning of about 4,000 tokens."""
    cases = []
    for number in range(count):
        turn = retrieval(Source(f"evaluation-{number}", True), LONG_TEXT_WORDS, _EARLY)
        system = [{"role": "system", "content": turn.system}] if turn.system else []
        messages = [*system, {"role": "user", "content": turn.user}]
        cases.append(Case(messages, [], _says((turn.answer,))))
    return cases


def _dialogues(kind: str) -> Any:
    number = 0
    while True:
        yield dialogue(f"evaluation-{number}", True, kind)
        number += 1


def _calls(wanted: list[Json]) -> Callable[[Json], bool]:
    def is_right(reply: Json) -> bool:
        calls = [call["function"] for call in reply.get("tool_calls") or []]
        got = [{"name": c["name"], "arguments": json.loads(c["arguments"])} for c in calls]
        key = functools.partial(json.dumps, sort_keys=True)
        return sorted(got, key=key) == sorted(wanted, key=key)

    return is_right


def _says(texts: tuple[str, ...]) -> Callable[[Json], bool]:
    def is_right(reply: Json) -> bool:
        content = reply.get("content") or ""
        return not reply.get("tool_calls") and all(text in content for text in texts)

    return is_right


async def judge(
    url: str, cases: list[Case], thinking: bool, concurrency: int
) -> tuple[float, float]:
    """Shares of right replies and of replies that closed their thought and ended by themselves."""
    slots = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=None)

    async def ask(case: Case) -> tuple[bool, bool]:
        body: Json = {
            "model": "demo",
            "messages": case.messages,
            "temperature": 0,
            "max_tokens": _MAX_TOKENS,
            "chat_template_kwargs": {"enable_thinking": thinking},
        }
        if case.tools:
            body["tools"] = case.tools
        async with slots, session.post(f"{url}/v1/chat/completions", json=body) as response:
            reply = await response.json()
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {reply}")
        choice = reply["choices"][0]
        message = choice["message"]
        answered = bool(message.get("content") or message.get("tool_calls"))
        ended = answered and choice["finish_reason"] in ("stop", "tool_calls")
        return case.is_right(message), ended

    async with aiohttp.ClientSession(timeout=timeout) as session:
        found = await asyncio.gather(*map(ask, cases))
    right, ended = zip(*found, strict=True)
    return sum(right) / len(right), sum(ended) / len(ended)


async def evaluate(url: str, count: int, concurrency: int) -> None:
    """Print the table."""
    rows = {
        "one call, all arguments": call_cases("call", count, 1),
        "two calls, both right": call_cases("parallel", count, 2),
        "no call when none fits": no_call_cases(count),
        "answer uses tool results": result_cases(count),
        "early fact in 4k tokens": retrieval_cases(count // 2),
    }
    header = ("held out, greedy", "cases", "thinking", "ended", "off", "ended")
    print("{:26} {:>5}  {:>8} {:>6}  {:>6} {:>6}".format(*header))
    ended: list[float] = []
    for name, cases in rows.items():
        shares: list[float] = []
        for thinking in (True, False):
            shares += await judge(url, cases, thinking, concurrency)
        ended += [shares[1], shares[3]]
        row = "{:26} {:5}  {:8.3f} {:6.3f}  {:6.3f} {:6.3f}"
        print(row.format(name, len(cases), *shares), flush=True)
    print(f"ended by themselves, least of all: {min(ended):.3f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Judge the demo model of a running server.")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--count", type=int, default=200, help="cases of each kind")
    parser.add_argument("--concurrency", type=int, default=8)
    args = parser.parse_args()
    asyncio.run(evaluate(args.url.rstrip("/"), args.count, args.concurrency))


if __name__ == "__main__":
    main()
