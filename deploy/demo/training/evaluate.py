"""Judges a running server with the demo model on held-out dialogues, over HTTP, greedy.

glimmer demo --port 8000 &
python -m glimmer.deploy.demo.training.evaluate --url http://localhost:8000
"""

import argparse
import asyncio
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from .dialogues import Dialogue, dialogue
from .questions import LONG_TEXT_WORDS, retrieval
from .words import Source

Json = dict[str, Any]
_MAX_TOKENS = 400
_EARLY = 0.1  # the fact is in the first tenth of the text


@dataclass(frozen=True)
class Case:
    """A request, and a function that says whether a reply message is right."""

    messages: list[Json]
    tools: list[Json]
    is_right: Callable[[Json], bool]


def call_cases(kind: str, count: int, num_calls: int) -> list[Case]:
    """Held-out dialogues whose reply is `num_calls` calls. Names and all arguments must be right,
    in any order."""
    cases: list[Case] = []
    for item in _dialogues(kind):
        reply = item.messages[item.first_reply]
        calls = [call["function"] for call in reply.get("tool_calls", [])]
        if len(calls) == num_calls and len(cases) < count:
            cases.append(Case(item.messages[: item.first_reply], item.tools, _has_calls(calls)))
        if len(cases) == count:
            break
    return cases


def no_call_cases(count: int) -> list[Case]:
    """None of the tools fits. The reply must have no call."""
    dialogues = [dialogue(f"evaluation-{n}", True, "no_call") for n in range(count)]
    return [
        Case(d.messages[: d.first_reply], d.tools, lambda reply: not reply.get("tool_calls"))
        for d in dialogues
    ]


def result_cases(count: int) -> list[Case]:
    """Tools have answered: the reply must say every value they gave."""
    cases: list[Case] = []
    for item in _dialogues("result"):
        if item.must_say:
            cases.append(Case(item.messages[:-1], item.tools, _says(item.must_say)))
        if len(cases) == count:
            break
    return cases


def retrieval_cases(count: int, words: int = LONG_TEXT_WORDS) -> list[Case]:
    """A fact near the beginning of a text of about `words` words (by default 4,000 tokens)."""
    cases = []
    for number in range(count):
        turn = retrieval(Source(f"evaluation-{number}", True), words, _EARLY)
        system = [{"role": "system", "content": turn.system}] if turn.system else []
        messages = [*system, {"role": "user", "content": turn.user}]
        cases.append(Case(messages, [], _says((turn.answer,))))
    return cases


def _dialogues(kind: str) -> Iterator[Dialogue]:
    for number in itertools.count():
        yield dialogue(f"evaluation-{number}", True, kind)


def _has_calls(expected: list[Json]) -> Callable[[Json], bool]:
    def is_right(reply: Json) -> bool:
        calls = [call["function"] for call in reply.get("tool_calls") or []]
        parsed = [{"name": c["name"], "arguments": json.loads(c["arguments"])} for c in calls]
        key = functools.partial(json.dumps, sort_keys=True)
        return sorted(parsed, key=key) == sorted(expected, key=key)

    return is_right


def _says(texts: tuple[str, ...]) -> Callable[[Json], bool]:
    def is_right(reply: Json) -> bool:
        content = reply.get("content") or ""
        return not reply.get("tool_calls") and all(text in content for text in texts)

    return is_right


async def judge(
    url: str, cases: list[Case], thinking: bool, concurrency: int
) -> tuple[float, float, float]:
    """Shares of right replies, and of replies that closed their reasoning and ended with an end
    token; mean number of the prompts' tokens."""
    slots = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=None)

    async def ask(case: Case) -> tuple[bool, bool, int]:
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
        return case.is_right(message), ended, reply["usage"]["prompt_tokens"]

    async with aiohttp.ClientSession(timeout=timeout) as session:
        results = await asyncio.gather(*map(ask, cases))
    right, ended, tokens = (sum(column) / len(cases) for column in zip(*results, strict=True))
    return right, ended, tokens


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
            right, ended_share, _ = await judge(url, cases, thinking, concurrency)
            shares += [right, ended_share]
        ended += [shares[1], shares[3]]
        row = "{:26} {:5}  {:8.3f} {:6.3f}  {:6.3f} {:6.3f}"
        print(row.format(name, len(cases), *shares), flush=True)
    print(f"ended by themselves, least of all: {min(ended):.3f}")


async def evaluate_lengths(url: str, count: int, concurrency: int, lengths: list[int]) -> None:
    """Print the share of early facts that are found, by the number of words of the text."""
    print("{:>6} {:>6}  {:>8} {:>6}".format("words", "tokens", "thinking", "off"))
    for words in lengths:
        cases = retrieval_cases(count, words)
        on, _, tokens = await judge(url, cases, True, concurrency)
        off, _, _ = await judge(url, cases, False, concurrency)
        print(f"{words:6} {tokens:6.0f}  {on:8.3f} {off:6.3f}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Judge the demo model of a running server.")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--count", type=int, default=200, help="cases of each kind")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--words", type=int, nargs="+", help="only early facts, in such texts")
    args = parser.parse_args()
    if args.words:
        url = args.url.rstrip("/")
        asyncio.run(evaluate_lengths(url, args.count, args.concurrency, args.words))
        return
    asyncio.run(evaluate(args.url.rstrip("/"), args.count, args.concurrency))


if __name__ == "__main__":
    main()
