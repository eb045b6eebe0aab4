"""The process itself: orders in, answers out, whatever an order does to its child."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xgrammar
from glimmer.frontend.grammar.compile_child import (
    VOCABULARY_FILE,
    Answer,
    Order,
    Setup,
    last_word_bits,
)
from glimmer.frontend.grammar.source import GrammarSource, OutputFormat
from glimmer.frontend.text.template import receive, send
from glimmer.frontend.text.tokenizer import Tokenizer


class Process:
    """A compiling process and the way to it."""

    def __init__(self, tokenizer: Tokenizer, directory: Path, **limits: float) -> None:
        vocabulary = tokenizer.vocabulary
        values = {"memory_mb": 256.0, "compiled_mb": 4.0, "timeout_s": 20.0, **limits}
        setup = Setup(
            str(directory), vocabulary.token_bytes, vocabulary.added_ids, [524], 1, **values
        )
        self.directory = directory
        self.link, theirs = socket.socketpair()
        self.link.settimeout(60)
        module = "glimmer.frontend.grammar.compile_child"
        with theirs:
            self.child = subprocess.Popen(
                [sys.executable, "-m", module, str(os.getpid())], stdin=theirs.fileno()
            )
        send(self.link, msgspec.msgpack.encode(setup))
        assert receive(self.link) == b"ready"
        self._number = 0

    def order(self, kind: Any, source: Any = None) -> int:
        self._number += 1
        form = OutputFormat(kind, source, "field")
        encoded = msgspec.json.encode(GrammarSource(form))
        order = Order(self._number, f"name{self._number}", encoded)
        send(self.link, msgspec.msgpack.encode(order))
        return self._number

    def answer(self) -> Answer:
        return msgspec.msgpack.decode(receive(self.link), type=Answer)

    def ask(self, kind: Any, source: Any = None) -> Answer:
        number = self.order(kind, source)
        answer = self.answer()
        assert answer.number == number
        return answer

    def close(self) -> None:
        self.link.close()
        assert self.child.wait(20) == 0


@pytest.fixture(scope="module")
def process(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tokenizer, tmp_path_factory.mktemp("grammars"))
    yield process
    process.close()


def test_a_grammar_is_stored_with_its_vocabulary(process: Process, tokenizer: Tokenizer) -> None:
    answer = process.ask("json_object")
    path = process.directory / f"name{answer.number}"
    assert (answer.error, answer.size) == ("", path.stat().st_size)
    stored = (process.directory / VOCABULARY_FILE).read_text()
    vocabulary = xgrammar.TokenizerInfo.deserialize_json(stored)
    compiled = xgrammar.CompiledGrammar.deserialize_json(path.read_text(), vocabulary)
    matcher = xgrammar.GrammarMatcher(compiled)
    assert matcher.accept_string('{"a": [1, null]}')
    assert not matcher.accept_token(tokenizer.vocabulary.added_ids["<tool_call>"])
    assert matcher.accept_token(524)


@pytest.mark.parametrize(
    ("kind", "source", "problem"),
    [
        ("ebnf", "root ::= (((", "is not a valid grammar: EBNF parser error"),
        ("ebnf", "root ::= nope", "not a valid grammar"),
        ("ebnf", 'root ::= root "a" | root', "matches nothing"),
        ("ebnf", "root ::= " + '("a" | ' * 5000 + '"b"' + ")" * 5000, "not a valid grammar"),
        ("json_schema", {"uniqueItems": True}, "#: uniqueItems"),
        ("regex", "(a{1000}){1000}", "states"),
    ],
)
def test_what_is_wrong_names_its_field(
    process: Process, kind: Any, source: Any, problem: str
) -> None:
    answer = process.ask(kind, source)
    assert problem in answer.error
    assert answer.field == "field"


def test_limits_end_the_child_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    process = Process(tokenizer, tmp_path, memory_mb=24, timeout_s=1.5)
    many = {f"p{n}": {"type": "string", "maxLength": 60} for n in range(1, 60)}
    slow = {n: {**s, "minLength": i} for i, (n, s) in enumerate(many.items())}
    number = process.order("json_schema", {"properties": slow})
    quick = process.order("choice", ["a"])  # beside it
    answers = {answer.number: answer for answer in (process.answer(), process.answer())}
    assert answers[quick].error == ""
    assert "--grammar_" in answers[number].error
    assert answers[number].field == ""
    assert process.ask("json_object").error == ""
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".new"]
    process.close()


def test_memory_ends_the_child_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    process = Process(tokenizer, tmp_path, memory_mb=24, timeout_s=60)
    enums = [{"enum": [f"value {n} of {part}" for n in range(9000)]} for part in range(7)]
    assert "MB (--grammar_memory_mb)" in process.ask("json_schema", {"anyOf": enums}).error
    assert process.ask("json_object").error == ""
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".new"]
    process.close()


def test_a_large_result_is_not_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    process = Process(tokenizer, tmp_path, compiled_mb=0.25)
    answer = process.ask("json_schema", {"type": "string", "maxLength": 150})
    assert "MB (--grammar_compiled_mb)" in answer.error
    assert [path.name for path in tmp_path.iterdir()] == [VOCABULARY_FILE]
    process.close()


def test_the_bits_behind_the_vocabulary_are_known() -> None:
    assert last_word_bits(584) == 0xFF
    assert last_word_bits(33) == 1
    assert last_word_bits(64) == -1
    assert last_word_bits(63) == 0x7FFFFFFF
