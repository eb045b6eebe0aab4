"""The process itself: sources in, answers out, and hostile sources that end it."""

import json
import signal
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec
import psutil
import pytest
from glimmer.frontend.child import ChildDiedError, KillableChild
from glimmer.frontend.grammar.check_child import Answer, Setup
from glimmer.frontend.grammar.source import GrammarSource, OutputFormat
from glimmer.shared.grammar import make_matcher, read_tokenizer
from schemas import ADDED_IDS, TAG_IDS


def make_child(**limits: float) -> KillableChild:
    setup = Setup(154_880, ADDED_IDS, **{"memory_mb": 256.0, "timeout_s": 0.5, **limits})
    module = "glimmer.frontend.grammar.check_child"
    return KillableChild(module, msgspec.json.encode(setup), 120.0)


def ask(child: KillableChild, kind: Any, source: Any) -> Answer:
    message = msgspec.json.encode(GrammarSource(OutputFormat(kind, source, "field")))
    return msgspec.json.decode(child.ask(message), type=Answer)


@pytest.fixture(scope="module")
def child() -> Iterator[KillableChild]:
    """One for all tests; it starts again after it was ended."""
    with closing(make_child()) as child:
        yield child


def test_an_answer_is_a_grammar_for_any_vocabulary(child: KillableChild, tiny_model: Any) -> None:
    answer = ask(child, "json_object", None)
    assert (answer.error, answer.field) == ("", "")
    vocabulary = json.loads((tiny_model / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    tokenizer = read_tokenizer(tiny_model, 600)
    matcher = make_matcher(tokenizer, answer.text)
    assert matcher.consume_tokens(tokenizer.tokenize_str('{"a": [1, null]}'))
    assert matcher.is_accepting()
    assert tokenizer.eos_token == ids["<|endoftext|>"]
    assert not make_matcher(tokenizer, answer.text).consume_token(ids["<tool_call>"])


def chain(count: int, line: str, end: str) -> str:
    return "\n".join(line.format(n, n + 1) for n in range(count)) + f"\n{end.format(count)}"


def definitions(count: int, make: Any) -> dict[str, Any]:
    ends = {f"d{count}": {"type": "null"}}
    defs = {f"d{n}": make({"$ref": f"#/$defs/d{n + 1}"}) for n in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, **ends}}


def properties(count: int) -> dict[str, Any]:
    return {"properties": {f"p{n}": {"type": "string"} for n in range(count)}}


TITLE = {"title": "x"}
BOMBS: dict[str, tuple[Any, Any]] = {
    "a chain of rules": ("grammar", chain(3000, "r{}: r{}", 'r{}: "x"\nstart: r0')),
    "a chain of terminals": ("grammar", chain(9000, 'R{}: "a" R{} "b"', 'R{}: "x"\nstart: R0')),
    "doubling terminals": ("grammar", chain(60, "R{0}: R{1} R{1}", 'R{}: "x"\nstart: R0')),
    "a chain of references": ("json_schema", definitions(3000, lambda ref: ref)),
    "a chain of arrays": ("json_schema", definitions(3000, lambda ref: {"items": ref})),
    "a chain of allOf": ("json_schema", definitions(3000, lambda ref: {"allOf": [ref, TITLE]})),
    "many properties": ("json_schema", properties(8000)),
    "too many for a mask": ("json_schema", properties(2000)),
    "nested repeats": ("regex", "(a{1000}){1000}"),
    "nested repeats of few": ("regex", "((((a{30}){30}){30}){30})"),
    "optional repeats": ("regex", "(a?){5000}a{5000}"),
    "parentheses": ("regex", "(" * 50_000 + ")" * 50_000),
    "groups": ("regex", "(?:a" * 20_000 + ")?" * 20_000),
    "nested EBNF": ("grammar", "root ::= " + "(" * 60_000 + ")" * 60_000),
    "nested Lark": ("grammar", "start: " + "(" * 60_000 + '"a"' + ")" * 60_000),
    "a grammar of itself": ("grammar", "root ::= root | root root"),
    "not not not": ("grammar", "A: " + "~" * 50_000 + '"a"\nstart: A'),
    "many combinations": (
        "json_schema",
        {"allOf": [{"anyOf": [{"required": [f"p{n}{k}"]} for k in range(4)]} for n in range(20)]},
    ),
    "giant minItems": ("json_schema", {"type": "array", "minItems": 10**12}),
    "tiny multipleOf": ("json_schema", {"type": "number", "multipleOf": 1e-300}),
    "matches nothing": ("json_schema", {"enum": []}),
    "a loop of references": ("json_schema", {"$ref": "#"}),
}  # fmt: skip
HARMLESS: dict[str, tuple[Any, Any]] = {  # the library follows them as they are met
    "giant maxLength": ("json_schema", {"type": "string", "maxLength": 10**9}),
    "a pattern": ("json_schema", {"type": "string", "pattern": "(a{900}){900}"}),
    "three repeats": ("regex", "((a{0,100}){0,100}){0,100}"),
    "far back": ("regex", ".*a.{2000}b"),
    "not x": ("regex", "[^x]{1,100000}"),
    "backtracking": ("regex", "(x+x+)+y"),
    "a large enum": ("json_schema", {"enum": [f"{n} value" for n in range(15_000)]}),
    "deep schema": ("json_schema", json.loads('{"items":' * 230 + "{}" + "}" * 230)),
    "deep enum": ("json_schema", {"enum": json.loads("[" * 100 + "]" * 100)}),
    "arrays of arrays": (
        "json_schema",
        {"type": "array", "minItems": 1000, "items": {"maxItems": 1000, "items": {"maxLength": 9}}},
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_the_child_at_most(child: KillableChild, name: str) -> None:
    code = 0
    try:
        answer = ask(child, *BOMBS[name])
        assert answer.field == "field"
        assert answer.error
        assert len(answer.error) < 400
    except ChildDiedError as death:
        code = -death.code
    assert code in (0, signal.SIGSEGV, signal.SIGPROF)
    assert ask(child, "choice", ["a"]).error == ""


@pytest.mark.parametrize("name", HARMLESS)
def test_what_looks_like_a_bomb_and_is_none(child: KillableChild, name: str) -> None:
    assert ask(child, *HARMLESS[name]).error == ""


def test_memory_is_limited() -> None:
    with closing(make_child(memory_mb=16, timeout_s=20)) as child:
        enums = [{"enum": [f"value {n} of {part}" for n in range(5000)]} for part in range(7)]
        with pytest.raises(ChildDiedError) as death:
            ask(child, "json_schema", {"anyOf": enums})
        assert death.value.code == -signal.SIGABRT
        assert ask(child, "choice", ["a"]).error == ""


def test_the_limit_of_time_is_one_of_each_source(child: KillableChild) -> None:
    """It counts processor time, and begins anew with each source."""
    schema = properties(200)
    for n in range(40):
        assert ask(child, "json_schema", {**schema, "minLength": n}).error == ""
    assert child.process_id is not None
    times = psutil.Process(child.process_id).cpu_times()
    assert times.user + times.system > 0.5


def test_tags_are_named_by_their_ids(child: KillableChild) -> None:
    functions = ({"name": "f", "parameters": {}},)
    message = msgspec.json.encode(GrammarSource(None, "must", False, functions, ("tool",)))
    answer = msgspec.json.decode(child.ask(message), type=Answer)
    assert f"<[{TAG_IDS['<tool_call>']}]>" in answer.text


def test_a_grammar_that_no_message_can_hold_is_refused(child: KillableChild) -> None:
    enums = [[f"value {k} of {n}" for k in range(2000)] for n in range(50)]
    parameters = {"properties": {f"p{n}": {"enum": enum} for n, enum in enumerate(enums)}}
    source = GrammarSource(
        None, "must", True, ({"name": "f", "parameters": parameters},), ("tool",)
    )
    answer = msgspec.json.decode(child.ask(msgspec.json.encode(source)), type=Answer)
    assert answer == Answer("", "tool", "has more than 1000 kB as a grammar")
