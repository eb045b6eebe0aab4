"""Judges a running server on requests as people type them, over HTTP, greedy.

    glimmer serve demo --port 8000 &
    python -m glimmer.deploy.demo.training.asked --url http://localhost:8000 --mistakes mistakes.txt

The requests are data in `tests/deploy/demo/requests`, written by hand and apart from the generator.
Training never reads them. `evaluate.py` has the dialogues of the generator's held-out side.
"""

import argparse
import asyncio
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from .typed.grammar import RESERVED, frame_checksum

Json = dict[str, Any]
REQUESTS = Path(__file__).parents[3] / "tests" / "deploy" / "demo" / "requests"
KINDS = {
    "call": "tool calls, all arguments",
    "no_call": "no call when none fits",
    "arithmetic": "arithmetic",
    "limits": "honest limits",
    "talk": "facts and small talk",
    "text": "lists, texts, JSON",
    "loop": "tool loops finished",
}
_MAX_TOKENS = 500
_LONGEST_LIMIT = 300  # characters of a sentence that tells the model's limits
_ANY = "*"  # accepted for every value


@dataclass(frozen=True)
class Outcome:
    """Whether the replies to one request were right, whether all ended by themselves, and the last
    reply's message."""

    right: bool
    ended: bool
    reply: Json


def load(directory: Path = REQUESTS) -> dict[str, list[Json]]:
    """The requests of each kind. `tools` of a request are declarations."""
    tools = json.loads((directory / "tools.json").read_text())
    cases: dict[str, list[Json]] = {}
    for kind in KINDS:
        lines = (directory / f"{kind}.jsonl").read_text().splitlines()
        cases[kind] = [json.loads(line) for line in lines]
        for case in cases[kind]:
            names = case.get("tools", [])
            case["tools"] = [{"type": "function", "function": tools[name]} for name in names]
    return cases


def reserved_frames(directory: Path = REQUESTS) -> list[str]:
    """The requests without the values that calls take from them: training may not use them."""
    frames: list[str] = []
    for cases in load(directory).values():
        for case in cases:
            steps = [call for step in case.get("steps", []) for call in step["calls"]]
            calls = [*case.get("calls", []), *steps]
            values = {str(v) for call in calls for vs in call["arguments"].values() for v in vs}
            frame = case["ask"]
            for value in sorted(values, key=len, reverse=True):
                frame = re.sub(re.escape(value), "{}", frame, flags=re.IGNORECASE)
            frames.append(frame)
    return frames


def is_right(kind: str, case: Json, reply: Json) -> bool:
    """Whether one reply's message is right for a request that is no tool loop."""
    content, calls = reply.get("content") or "", reply.get("tool_calls") or []
    if kind == "call":
        return match_calls(case["calls"], calls) is not None
    if calls or not content.strip():
        return False
    match kind:
        case "no_call":
            return True
        case "arithmetic":
            return _last_number(content) in case["number"]
        case "limits":
            return tells_limits(content)
        case "talk":
            return not tells_limits(content) and says(content, case["say"])
        case "text":
            return (
                _has_json(content, case["json"]) if "json" in case else says(content, case["say"])
            )
    raise ValueError(f"no kind of request: {kind}")


def match_calls(expected: list[Json], calls: list[Json]) -> list[int] | None:
    """For each call of a reply the index of the expected call that it is, in any order. None: they
    are not the expected calls."""
    if len(calls) != len(expected):
        return None
    indices: list[int] = []
    for call in calls:
        fits = (n for n, one in enumerate(expected) if n not in indices and _is_call(one, call))
        index = next(fits, None)
        if index is None:
            return None
        indices.append(index)
    return indices


def _is_call(expected: Json, call: Json) -> bool:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return False
    needed, optional = expected["arguments"], expected.get("optional", {})
    if function["name"] != expected["name"] or not set(needed) <= set(arguments):
        return False
    accepted = {**needed, **optional}
    return all(
        name in accepted and any(_same(value, wanted) for wanted in accepted[name])
        for name, value in arguments.items()
    )


def _same(value: Any, wanted: Any) -> bool:
    """Equal, but for case, spaces and marks around a text, and 5 for 5.0."""
    if wanted == _ANY:
        return True
    if isinstance(value, str) and isinstance(wanted, str):
        return _plain(value) == _plain(wanted)
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, list) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_same, value, wanted))
    if isinstance(value, dict) and isinstance(wanted, dict):
        return value.keys() == wanted.keys() and all(_same(value[k], wanted[k]) for k in wanted)
    return bool(value == wanted)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!?\"'")


def says(content: str, texts: list[str]) -> bool:
    """Whether one of the texts stands in the content as whole words, in any case."""
    folded = " ".join(content.casefold().split())
    return any(re.search(rf"(?<!\w){re.escape(t.casefold())}(?!\w)", folded) for t in texts)


def tells_limits(content: str) -> bool:
    """Whether the content is one short sentence that says what the model is and what it can do."""
    folded = content.casefold()
    named = "small demo model" in folded and re.search(r"\bcan\b", folded) is not None
    return named and len(content) <= _LONGEST_LIMIT and "{" not in content


def _last_number(content: str) -> str:
    numbers = re.findall(r"-?\d+(?:\.\d+)?", content.replace(",", ""))
    return numbers[-1] if numbers else ""


def _has_json(content: str, wanted: Any) -> bool:
    try:
        value = json.loads(re.sub(r"^```(?:json)?|```$", "", content.strip()))
    except ValueError:
        return False
    return _same(value, wanted)


class Asker:
    """Sends requests to one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str, concurrency: int) -> None:
        self._session = session
        self._url = url
        self._slots = asyncio.Semaphore(concurrency)

    async def judge(self, kind: str, case: Json, thinking: bool) -> Outcome:
        """Ask one request, with all steps of a tool loop, and judge the replies."""
        messages: list[Json] = [{"role": "user", "content": case["ask"]}]
        if "system" in case:
            messages.insert(0, {"role": "system", "content": case["system"]})
        async with self._slots:
            if kind == "loop":
                return await self._loop(case, messages, thinking)
            reply, ended = await self._ask(messages, case["tools"], thinking)
            return Outcome(is_right(kind, case, reply), ended, reply)

    async def _loop(self, case: Json, messages: list[Json], thinking: bool) -> Outcome:
        for step in case["steps"]:
            reply, ended = await self._ask(messages, case["tools"], thinking)
            calls = reply.get("tool_calls") or []
            indices = match_calls(step["calls"], calls)
            if indices is None:
                return Outcome(False, ended, reply)
            messages.append({"role": "assistant", **reply})
            for call, index in zip(calls, indices, strict=True):
                result = step["results"][index]
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        reply, ended = await self._ask(messages, case["tools"], thinking)
        content = reply.get("content") or ""
        right = not reply.get("tool_calls") and all(says(content, [t]) for t in case["say"])
        return Outcome(right, ended, reply)

    async def _ask(
        self, messages: list[Json], tools: list[Json], thinking: bool
    ) -> tuple[Json, bool]:
        """A reply's message and whether it ended by itself. A refusal is a reply that did not."""
        body: Json = {
            "model": "demo",
            "messages": messages,
            "temperature": 0,
            "max_tokens": _MAX_TOKENS,
            "chat_template_kwargs": {"enable_thinking": thinking},
        }
        if tools:
            body["tools"] = tools
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as response:
            answer = await response.json()
        if response.status != 200:
            return {"content": f"HTTP {response.status}: {answer}", "tool_calls": None}, False
        choice = answer["choices"][0]
        kept = ("content", "reasoning_content", "tool_calls")
        message = {key: choice["message"].get(key) for key in kept}
        return message, choice["finish_reason"] in ("stop", "tool_calls")


async def evaluate(
    url: str, directory: Path, concurrency: int, every: int
) -> tuple[list[str], list[str]]:
    """The table's lines, and a line for each wrong reply. Of `every` requests one is asked."""
    header = ("as people type, greedy", "cases", "thinking", "ended", "off", "ended")
    table = ["{:26} {:>5}  {:>8} {:>6}  {:>6} {:>6}".format(*header)]
    mistakes: list[str] = []
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        asker = Asker(session, url, concurrency)
        for kind, cases in load(directory).items():
            asked = cases[::every]
            shares: list[float] = []
            for thinking in (True, False):
                outcomes = await asyncio.gather(
                    *(asker.judge(kind, case, thinking) for case in asked)
                )
                shares.append(sum(one.right for one in outcomes) / len(asked))
                shares.append(sum(one.ended for one in outcomes) / len(asked))
                mistakes += [
                    f"{kind} {'on' if thinking else 'off'}: {case['ask']!r} -> {_shown(one.reply)}"
                    for case, one in zip(asked, outcomes, strict=True)
                    if not one.right
                ]
            row = "{:26} {:5}  {:8.3f} {:6.3f}  {:6.3f} {:6.3f}"
            table.append(row.format(KINDS[kind], len(asked), *shares))
            print("\n".join(table[-2:] if len(table) == 2 else table[-1:]), flush=True)
    return table, mistakes


def _shown(reply: Json) -> str:
    calls = [call["function"] for call in reply.get("tool_calls") or []]
    shown = [f"{call['name']}({call['arguments']})" for call in calls]
    return repr(reply.get("content") or "")[:200] + " ".join(shown)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Judge a running server on typed requests.")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--requests", type=Path, default=REQUESTS, help="directory of the requests")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--every", type=int, default=1, help="ask one request of so many")
    parser.add_argument("--mistakes", type=Path, help="file for the wrong replies")
    parser.add_argument("--reserve", action="store_true", help="only write typed/reserved.txt")
    args = parser.parse_args()
    if args.reserve:
        checksums = map(frame_checksum, reserved_frames(args.requests))
        sums = {number for number in checksums if number is not None}
        RESERVED.write_text("".join(f"{number:08x}\n" for number in sorted(sums)))
        return
    url = args.url.rstrip("/")
    _, mistakes = asyncio.run(evaluate(url, args.requests, args.concurrency, args.every))
    if args.mistakes:
        args.mistakes.write_text("".join(f"{line}\n" for line in mistakes))


if __name__ == "__main__":
    main()
