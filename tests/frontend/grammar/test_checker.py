"""What requests see of checking: grammars, errors, a process that is replaced."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psutil
import pytest
import pytest_asyncio
from glimmer.frontend.grammar import checker as checker_module
from glimmer.frontend.grammar.checker import GrammarChecker
from glimmer.frontend.grammar.source import GrammarSource, OutputFormat
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import OverloadedError, RequestError, UnavailableError
from schemas import ADDED_IDS

Make = Callable[..., GrammarChecker]
pytestmark = pytest.mark.asyncio(loop_scope="module")
SLOW = GrammarSource(OutputFormat("regex", "(a{1000}){1000}", "guided"))


def source(kind: Any, value: Any = None) -> GrammarSource:
    return GrammarSource(OutputFormat(kind, value, "guided"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def checker() -> AsyncIterator[GrammarChecker]:
    """One for tests that do it no harm: a process takes a while to start."""
    checker = GrammarChecker(ServeConfig(), 320, ADDED_IDS)
    checker.start()
    yield checker
    checker.close()


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[GrammarChecker] = []

    def go(**limits: Any) -> GrammarChecker:
        made.append(GrammarChecker(ServeConfig(**limits), 320, ADDED_IDS))
        return made[-1]

    yield go
    for checker in made:
        checker.close()
        assert pids(checker) == []


def pids(checker: GrammarChecker) -> list[int]:
    return [child.process_id for child in checker.children if child.process_id is not None]


async def test_equal_sources_are_checked_once(checker: GrammarChecker) -> None:
    same = [checker.check(source("json_object")) for _ in range(5)]
    grammars = await asyncio.gather(*same, checker.check(source("choice", ["a"])))
    assert len({grammar.text for grammar in grammars}) == 2
    assert grammars[0].field == "guided"
    before = sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids(checker))
    for _ in range(500):
        assert await checker.check(source("json_object")) == grammars[0]
    after = sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids(checker))
    assert after - before < 0.05


async def test_errors_name_field_and_limit_and_harm_nobody(make: Make) -> None:
    checker = make(grammar_source_kb=4, grammar_timeout_s=0.5)
    big = source("json_schema", {"description": "x" * 10_000_000})
    with pytest.raises(RequestError, match=r"guided: exceeds 4 kB \(--grammar_source_kb\)"):
        await checker.check(big)
    assert pids(checker) == []
    results = await asyncio.gather(
        checker.check(SLOW),
        checker.check(source("json_schema", {"type": "array", "minItems": 10**9})),
        checker.check(source("json")),
        return_exceptions=True,
    )
    assert [getattr(result, "field", "-") for result in results] == ["guided"] * 3
    assert [isinstance(result, RequestError) for result in results] == [True, True, False]
    assert "guided: checking it takes more than 0.5 s (--grammar_timeout_s)" in str(results[0])
    assert "minItems must be at most" in str(results[1])


async def test_a_stack_that_overflows_is_a_bad_request(make: Make) -> None:
    checker = make()
    rules = [f'r{n}: ("a" ("b" ("c" ("d" r{n + 1})*)*)*)*' for n in range(990)]
    text = "\n".join([*rules, 'r990: "x"', "start: r0"])
    with pytest.raises(RequestError, match="guided: is too deep or too complex"):
        await checker.check(source("grammar", text))
    assert (await checker.check(source("json"))).text


async def test_a_limit_of_the_whole_names_the_largest_part(make: Make) -> None:
    checker = make(grammar_source_kb=1)
    functions = tuple(
        {"name": n, "parameters": {"title": "x" * k}} for n, k in (("a", 9), ("b", 2000))
    )
    with pytest.raises(RequestError) as caught:
        await checker.check(GrammarSource(None, "must", True, functions, ("one", "two")))
    assert caught.value.field == "two"


async def test_a_killed_process_is_replaced(make: Make) -> None:
    checker = make()
    await checker.check(source("json"))
    (first,) = pids(checker)
    os.kill(first, signal.SIGSTOP)
    waiting = [asyncio.create_task(checker.check(source("choice", [str(n)]))) for n in range(3)]
    await asyncio.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    grammars = await asyncio.gather(*waiting)
    assert len({grammar.text for grammar in grammars}) == 3
    assert first not in pids(checker)
    assert not psutil.pid_exists(first)


async def test_a_process_that_cannot_live_is_told_apart(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = make()
    for child in checker.children:
        monkeypatch.setattr(child, "_module", "glimmer.nothing")
    with pytest.raises(UnavailableError, match="does not answer"):
        await checker.check(source("json"))


async def test_one_who_leaves_does_not_spoil_it_for_others(checker: GrammarChecker) -> None:
    leaving = asyncio.create_task(checker.check(source("json")))
    staying = asyncio.create_task(checker.check(source("json")))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).text


async def test_one_slow_source_does_not_stop_the_others(make: Make) -> None:
    checker = make(grammar_timeout_s=3)
    slow = asyncio.create_task(checker.check(SLOW))
    for n in range(3):
        assert (await checker.check(source("choice", [str(n)]))).text
    assert not slow.done()
    with pytest.raises(RequestError):
        await slow


async def test_old_answers_go(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker_module, "_MAX_KEPT", 20_000)
    for n in range(8):
        await checker.check(source("choice", ["x" * 3000 + str(n)]))
    assert checker.num_kept < 8
    assert (await checker.check(source("choice", ["x" * 3000 + "0"]))).text


async def test_too_many_at_once_are_overload(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker_module, "_MAX_WAITING", 2)
    tasks = [asyncio.create_task(checker.check(source("choice", [f"many {n}"]))) for n in range(3)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[2], OverloadedError)
    assert not isinstance(results[0], Exception)
