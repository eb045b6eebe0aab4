"""What requests see of compiling: grammars, errors, a process that is replaced."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from glimmer.frontend.grammar.compiler import GrammarCompiler
from glimmer.frontend.grammar.source import GrammarSource, OutputFormat
from glimmer.frontend.text.tokenizer import Tokenizer
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import OverloadedError, RequestError

Make = Callable[..., GrammarCompiler]


def source(kind: Any, value: Any = None) -> GrammarSource:
    return GrammarSource(OutputFormat(kind, value, "guided"))


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def compiler(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GrammarCompiler]:
    """One for tests that do it no harm: a process takes seconds to start."""
    directory = tmp_path_factory.mktemp("shared") / "grammars"
    compiler = GrammarCompiler(ServeConfig(), tokenizer.vocabulary, (524,), directory)
    yield compiler
    await compiler.close()


@pytest_asyncio.fixture(loop_scope="module")
async def make(tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[Make]:
    made: list[GrammarCompiler] = []

    def go(**limits: Any) -> GrammarCompiler:
        config = ServeConfig(**limits)
        directory = tmp_path / f"grammars-{len(made)}"
        made.append(GrammarCompiler(config, tokenizer.vocabulary, (524,), directory))
        return made[-1]

    yield go
    for compiler in made:
        await compiler.close()
        assert not compiler.directory.exists()
        assert compiler.process_id is None


async def test_equal_sources_are_compiled_once(compiler: GrammarCompiler) -> None:
    same = [compiler.compile(source("json_object")) for _ in range(5)]
    other = compiler.compile(source("choice", ["a"]))
    grammars = await asyncio.gather(*same, other)
    assert len({grammar.name for grammar in grammars}) == 2
    assert all(Path(grammar.path).exists() for grammar in grammars)
    written = Path(grammars[0].path).stat().st_mtime_ns
    again = await compiler.compile(source("json_object"))
    assert again == grammars[0]
    assert Path(again.path).stat().st_mtime_ns == written


async def test_errors_name_field_and_limit_and_harm_nobody(make: Make) -> None:
    compiler = make(grammar_source_kb=4, grammar_memory_mb=64, grammar_timeout_s=20)
    big = source("json_schema", {"description": "x" * 10_000_000})
    with pytest.raises(RequestError, match=r"guided: exceeds 4 kB \(--grammar_source_kb\)"):
        await compiler.compile(big)
    assert compiler.process_id is None
    results = await asyncio.gather(
        compiler.compile(source("regex", "(a{1000}){1000}")),
        compiler.compile(source("json_schema", {"type": "array", "minItems": 10**9})),
        compiler.compile(source("json")),
        return_exceptions=True,
    )
    assert [getattr(result, "field", "-") for result in results] == ["guided", "guided", "-"]
    assert "minItems must be between" in str(results[1])


async def test_a_limit_of_the_whole_names_the_largest_part(make: Make) -> None:
    compiler = make(grammar_source_kb=1)
    functions = tuple(
        {"name": n, "parameters": {"title": "x" * k}} for n, k in (("a", 9), ("b", 2000))
    )
    with pytest.raises(RequestError) as caught:
        await compiler.compile(GrammarSource(None, "must", True, functions, ("one", "two")))
    assert caught.value.field == "two"


async def test_a_killed_process_is_replaced(make: Make) -> None:
    compiler = make()
    await compiler.compile(source("json"))
    first = compiler.process_id
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    waiting = [asyncio.create_task(compiler.compile(source("choice", [str(n)]))) for n in range(3)]
    await asyncio.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    grammars = await asyncio.gather(*waiting)
    assert len({grammar.name for grammar in grammars}) == 3
    assert compiler.process_id not in (None, first)
    assert not psutil.pid_exists(first)


async def test_one_who_leaves_does_not_spoil_it_for_others(compiler: GrammarCompiler) -> None:
    leaving = asyncio.create_task(compiler.compile(source("json")))
    staying = asyncio.create_task(compiler.compile(source("json")))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).name


async def test_old_files_go_unless_they_are_used(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glimmer.frontend.grammar.compiler.CACHE_FACTOR", 1)
    compiler = make(grammar_compiled_mb=1)
    held = await compiler.compile(source("json"))
    compiler.hold(held.name)
    compiler.hold(held.name)
    assert compiler.num_held == 1
    names = []
    for least in range(8):
        schema = {"type": "string", "minLength": least, "maxLength": 30}
        names.append((await compiler.compile(source("json_schema", schema))).path)
    kept = [path for path in names if Path(path).exists()]
    assert kept == names[-len(kept) :]
    assert 0 < len(kept) < len(names)
    assert sum(Path(path).stat().st_size for path in [*kept, held.path]) <= 1 << 20
    assert Path(held.path).exists()
    compiler.release(held.name)
    assert compiler.num_held == 1
    compiler.release(held.name)
    assert compiler.num_held == 0
    await compiler.compile(source("json_schema", {"type": "string", "maxLength": 29}))
    assert not Path(held.path).exists()
    again = await compiler.compile(source("json"))
    assert Path(again.path).exists()


async def test_too_many_at_once_are_overload(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glimmer.frontend.grammar.compiler._MAX_WAITING", 2)
    tasks = [
        asyncio.create_task(compiler.compile(source("choice", [f"many {n}"]))) for n in range(3)
    ]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[2], OverloadedError)
    assert not isinstance(results[0], Exception)
