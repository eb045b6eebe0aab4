"""Rows with grammars: what they may sample, beside any others, whatever interrupts them."""

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine
from glimmer.frontend.grammar.source import GrammarSource
from glimmer.frontend.text.tokenizer import Tokenizer
from glimmer.kernels.sampling.sampling import unpack_bits
from glimmer.shared.messages import Grammar, RowAdmit
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.sampling.grammars import GrammarRows
from grammars import GrammarFiles
from schemas import random_schema

jsonschema_rs = pytest.importorskip("jsonschema_rs")  # a machine with a card may lack it

EOS = (524, 531, 533)
THINK_END, TOOL_CALL = 546, 547
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 12}},
    "required": ["a", "b"],
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model, load_model_spec(tiny_model).vocab_size)


@pytest.fixture(scope="module")
def files(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> GrammarFiles:
    return GrammarFiles(tmp_path_factory.mktemp("grammars"), tokenizer.vocabulary, EOS)


@pytest.fixture
def engine(tiny_model: Path, tmp_path: Path) -> Engine:
    return Engine(tiny_model, tmp_path)


def wishes(seed: int = 1, **values: Any) -> SamplingParams:
    defaults = {"max_new_tokens": 300, "temperature": 1.0, "stop_token_ids": EOS, "seed": seed}
    return SamplingParams(**{**defaults, **values})


def text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    assert ids[-1] in EOS, "did not end by itself"
    assert not set(ids[:-1]) & set(tokenizer.vocabulary.added_ids.values())
    return tokenizer.decode(ids[:-1])


def admit(grammar: Grammar | None, matched: Sequence[int] = (), row: int = 0) -> RowAdmit:
    return RowAdmit(row, wishes(), [], 0, len(matched), [], grammar, list(matched))


@pytest.fixture
def rows(tokenizer: Tokenizer) -> Any:
    rows = GrammarRows(len(tokenizer.vocabulary.token_bytes))
    yield rows
    rows.close()


def load(rows: GrammarRows, grammar: Grammar) -> str:
    done, errors = threading.Event(), []
    rows.load(grammar, lambda name, error: (errors.append(error), done.set()))
    assert done.wait(60)
    return errors[0]


def legal(rows: GrammarRows, row: int = 0) -> set[int]:
    places, words = rows.masks([row])
    assert places == [0]
    return set(unpack_bits(words, 584)[0].nonzero().flatten().tolist())


# --- the rows alone ---------------------------------------------------------------------------


def test_a_row_follows_its_grammar_to_the_end(rows: GrammarRows, files: GrammarFiles) -> None:
    grammar = files.make("choice", ["ab", "c"])
    assert load(rows, grammar) == ""
    assert rows.names == {grammar.name}
    rows.admit(admit(grammar))
    a, b, c = (token[0] - 33 for token in (b"a", b"b", b"c"))  # bytes from "!" on are ids from 0
    first = legal(rows)
    assert {a, c} <= first
    assert not first & set(EOS)
    rows.advance([0, 1], [a, 5])  # row 1 has no grammar
    assert legal(rows) == {b}
    rows.advance([0], [b])
    assert legal(rows) == set(EOS)
    rows.advance([0], [EOS[1]])
    assert legal(rows) == set(EOS)  # the extra step of the look-ahead finds something
    rows.admit(admit(grammar, [c]))
    assert legal(rows) == set(EOS)
    rows.admit(admit(None))
    assert rows.rows == set()
    assert rows.masks([0])[0] == []


def test_a_token_that_does_not_fit_ends_the_turn(rows: GrammarRows, files: GrammarFiles) -> None:
    grammar = files.make("choice", ["ab"])
    load(rows, grammar)
    rows.admit(admit(grammar))
    rows.advance([0], [7])
    assert legal(rows) == set(EOS)


def test_free_until_the_start_token(rows: GrammarRows, files: GrammarFiles) -> None:
    grammar = files.make("choice", ["a"], start_id=THINK_END, banned_ids=(TOOL_CALL,))
    load(rows, grammar)
    rows.admit(admit(grammar, [1, 2]))
    assert set(range(560)) - legal(rows) == {TOOL_CALL, *EOS}
    rows.advance([0], [THINK_END])
    assert legal(rows) == {ord("a") - 33}
    rows.admit(admit(grammar, [1, THINK_END, ord("a") - 33]))
    assert legal(rows) == set(EOS)


def test_looking_ahead_does_not_move_the_row(rows: GrammarRows, files: GrammarFiles) -> None:
    grammar = files.make("choice", ["~`^"], start_id=THINK_END)
    load(rows, grammar)
    a, b, c = (code - 33 for code in b"~`^")
    rows.admit(admit(grammar))
    before = legal(rows)
    guesses = [5, THINK_END, a, b, c, EOS[0]]
    masks = unpack_bits(rows.look_ahead(0, guesses), 584)
    found = [set(mask.nonzero().flatten().tolist()) for mask in masks]
    assert found[0] == found[1] == before
    assert found[2:6] == [{a}, {b}, {c}, set(EOS)]
    wrong = unpack_bits(rows.look_ahead(0, [THINK_END, a, a, b]), 584)
    assert [bool(mask.any()) for mask in wrong] == [True, True, True, False, False]
    assert legal(rows) == before
    rows.advance([0], [THINK_END])
    assert legal(rows) == {a}


def test_what_cannot_be_loaded_says_so(rows: GrammarRows, tmp_path: Path) -> None:
    assert "FileNotFoundError" in load(rows, Grammar("x", str(tmp_path / "x")))
    assert rows.names == set()


def test_a_broken_file_says_so(rows: GrammarRows, files: GrammarFiles) -> None:
    grammar = files.make("choice", ["a"])
    broken = Path(grammar.path).with_name("broken")
    broken.write_text("{")
    assert load(rows, Grammar("broken", str(broken)))
    load(rows, grammar)
    rows.drop([grammar.name, "unknown"])
    rows.admit(admit(grammar))
    with pytest.raises(KeyError):
        rows.masks([0])


# --- in the engine ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_json_is_valid_whatever_is_sampled(
    engine: Engine, files: GrammarFiles, tokenizer: Tokenizer, seed: int
) -> None:
    schema = random_schema(seed, free_keys=False)
    grammar = files.make("json_schema", schema)
    validator = jsonschema_rs.validator_for(schema)
    sampling = wishes(seed, temperature=(0.0, 1.0, 2.0)[seed % 3], presence_penalty=0.5)
    for ids in engine.generate([[5, 6], [7]], sampling, grammar=grammar):
        assert validator.is_valid(json.loads(text(tokenizer, ids)))


def test_free_rows_do_not_notice_constrained_ones(
    engine: Engine, files: GrammarFiles, tokenizer: Tokenizer
) -> None:
    grammars = [None, files.make("json_schema", SCHEMA), None, files.make("regex", "[a-f]{9,40}")]
    prompts = [[5, 6, 7 + n] for n in range(4)]
    sampling = wishes(3, max_new_tokens=60)
    alone = [
        engine.generate([prompt], sampling, grammar=grammar)[0]
        for prompt, grammar in zip(prompts, grammars, strict=True)
    ]
    mixed = engine.generate_each(prompts, sampling, grammars)
    assert mixed == alone
    assert re.fullmatch("[a-f]{9,40}", text(tokenizer, mixed[3]))
    assert jsonschema_rs.validator_for(SCHEMA).is_valid(json.loads(text(tokenizer, mixed[1])))


def test_preempted_rows_go_on_where_their_grammar_was(
    tiny_model: Path, tmp_path: Path, files: GrammarFiles, engine: Engine, tokenizer: Tokenizer
) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 12, "maxItems": 20}
    grammar = files.make("json_schema", schema, start_id=THINK_END)
    prompts = [[n, 4, 4, 4] for n in range(6)]
    sampling = wishes(4, max_new_tokens=160, logit_bias=((THINK_END, 8.0),))
    small = Engine(
        tiny_model, tmp_path, page_size=4, max_total_token_num=400, max_req_total_len=200
    )
    expected = engine.generate(prompts, sampling, grammar=grammar)
    found = small.generate(prompts, sampling, grammar=grammar)
    assert small.preemptions > 0
    assert found == expected
    resumed = [a for m in small.messages for a in getattr(m, "admitted", []) if a.num_output_tokens]
    assert any(THINK_END in a.matched_ids for a in resumed)
    for ids in found:
        if ids[-1] in EOS:
            json.loads(tokenizer.decode(ids[ids.index(THINK_END) + 1 : -1]))


def test_other_wishes_give_way_to_the_grammar(
    engine: Engine, files: GrammarFiles, tokenizer: Tokenizer
) -> None:
    grammar = files.make("choice", ["yes", "no"])
    brace = ord("y") - 33, ord("n") - 33
    for values in (
        {"min_new_tokens": 50},
        {"logit_bias": tuple((i, -100.0) for i in range(500))},
        {"allowed_token_ids": (1, 2)},
        {"logit_bias": ((brace[0], -100.0), (brace[1], -100.0)), "min_new_tokens": 9},
        {"repetition_penalty": 2.0, "top_k": 1, "decay_start": 0, "decay_factor": 2.0},
    ):
        (ids,) = engine.generate([[3]], wishes(5, **values), grammar=grammar)
        assert text(tokenizer, ids) in ("yes", "no")
    allowed = {"allowed_token_ids": (brace[1], ord("o") - 33)}
    for seed in range(5):
        (ids,) = engine.generate([[3]], wishes(seed, **allowed), grammar=grammar)
        assert text(tokenizer, ids) == "no"


def test_calls_are_made_of_tag_tokens(
    engine: Engine, files: GrammarFiles, tokenizer: Tokenizer
) -> None:
    tool = {"name": "f", "parameters": {"properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}}
    grammar = files.compile(GrammarSource(None, "must", False, (tool,), ("field",)))
    (ids,) = engine.generate([[3]], wishes(), grammar=grammar)
    tags = [i for i in ids if i >= 524]
    assert tags[:-1] == [547, 551, 552, 553, 554, 548]
    assert tags[-1] in EOS
    pattern = "<tool_call>f<arg_key>n</arg_key><arg_value>(1|22)</arg_value></tool_call>"
    assert re.fullmatch(pattern, tokenizer.decode(ids[:-1]))


def test_logprobs_are_those_of_the_masked_choice(engine: Engine, files: GrammarFiles) -> None:
    grammar = files.make("choice", ["a", "b"])
    sampling = wishes(num_logprobs=3, temperature=1.0)
    engine.generate([[3]], sampling, grammar=grammar)
    rows = [row for m in engine.messages for row in getattr(m, "rows", []) if row.logprobs]
    first = rows[0].logprobs[0]
    likely = dict(first.top)
    letters = {ord("a") - 33, ord("b") - 33}
    assert set(likely) >= letters
    assert sum(torch.tensor([likely[i] for i in letters]).exp()) == pytest.approx(1, abs=1e-4)
    assert [value for i, value in first.top if i not in letters] == [-9999.0]


def test_nothing_is_left_behind(engine: Engine, files: GrammarFiles) -> None:
    grammar = files.make("json_schema", SCHEMA)
    engine.generate([[1], [2], [3]], wishes(), grammar=grammar)
    engine.generate([[4]], wishes(max_new_tokens=2))
    assert engine.runner.grammars is not None
    assert engine.runner.grammars.rows == set()
    assert engine.runner.grammars.names == {grammar.name}
