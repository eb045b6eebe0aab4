"""Rows with grammars: what they may sample, beside any others, whatever interrupts them."""

import json
import random
import re
import shutil
import threading
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine
from glimmer.frontend.text.tokenizer import Tokenizer
from glimmer.kernels.sampling.sampling import unpack_bits
from glimmer.shared import grammar as library
from glimmer.shared.messages import Finished, Grammar, RowAdmit
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.sampling.grammars import GrammarRows
from grammars import calls_grammar, choice_grammar, lark_grammar, regex_grammar, schema_grammar
from llguidance import LLParserLimits
from schemas import random_schema

jsonschema_rs = pytest.importorskip("jsonschema_rs")  # a machine with a card may lack it

EOS = (524, 531, 533)
THINK_END, TOOL_CALL = 546, 547
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 12}},
    "required": ["a", "b"],
}
TOOL = {"name": "f", "parameters": {"properties": {"n": {"enum": [1, 22]}}}}
# Harmless after x; after y there are too many ways to read a text.
MANY_WAYS = """
start: "x" /[a-z]{3,9}/ | "y" list
list: three list | three
three: item | item item | item item item
item: "q"? "r"? "s"? "t"? "u"?
"""
MANY_STATES = 'start: "y" /(.*a.{14}b)+/'


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model, load_model_spec(tiny_model).vocab_size)


@pytest.fixture(scope="module")
def calls(tokenizer: Tokenizer) -> Grammar:
    return calls_grammar(TOOL, tokenizer.vocabulary.added_ids)


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


def admit(
    grammar: Grammar | None, matched: Sequence[int] = (), row: int = 0, **values: Any
) -> RowAdmit:
    return RowAdmit(row, wishes(**values), [], 0, len(matched), [], grammar, list(matched))


@pytest.fixture
def make_rows(tiny_model: Path, request: pytest.FixtureRequest) -> Callable[..., GrammarRows]:
    def make(num_threads: int = 1, path: Path = tiny_model) -> GrammarRows:
        rows = GrammarRows(path, load_model_spec(tiny_model).vocab_size, num_threads)
        request.addfinalizer(rows.close)
        rows.preload()
        return rows

    return make


@pytest.fixture
def rows(make_rows: Callable[..., GrammarRows]) -> GrammarRows:
    return make_rows()


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set limits of the library."""

    def set_limits(**limits: int) -> None:
        made = LLParserLimits(verbose_errors=False, **limits)
        monkeypatch.setattr(library, "parser_limits", lambda: made)

    return set_limits


def closed(schema: Any) -> Any:
    """The schema with objects of named keys only, so that noise reaches their end."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    return made | {"additionalProperties": False} if "properties" in made else made


def ids_of(characters: str) -> list[int]:
    """Each as a token of its own: bytes from "!" on are ids from 0."""
    return [ord(character) - 33 for character in characters]


def sets(masks: torch.Tensor) -> list[set[int]]:
    return [set(bits.nonzero().flatten().tolist()) for bits in unpack_bits(masks, 584)]


def legal(rows: GrammarRows, row: int = 0) -> set[int]:
    places, words = rows.masks([row])
    assert places == [0]
    return sets(words)[0]


def errors(rows: GrammarRows, row: int = 0) -> tuple[int, str] | None:
    return rows.errors([row]).get(row)


# --- the rows alone ---------------------------------------------------------------------------


def test_a_row_follows_its_grammar_to_the_end(rows: GrammarRows) -> None:
    grammar = choice_grammar(["ab", "c"])
    rows.admit(admit(grammar))
    a, b, c = ids_of("abc")
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


def test_the_end_is_allowed_where_the_text_may_go_on(rows: GrammarRows) -> None:
    """The library's own token for the end is one of the row's stop tokens, or is none."""
    (a,) = ids_of("a")
    for stop_ids in (EOS, EOS[1:], (7, *EOS[:1])):
        rows.admit(admit(regex_grammar("[a]{1,3}"), [a], stop_token_ids=stop_ids))
        assert legal(rows) >= {a, *stop_ids}
        assert not legal(rows) & set(EOS) - set(stop_ids)
        rows.advance([0], [stop_ids[-1]])
        assert legal(rows) == set(stop_ids)


def test_stop_tokens_within_a_text_wait_for_its_end(rows: GrammarRows) -> None:
    a, b = ids_of("ab")
    rows.admit(admit(regex_grammar("[ab]{2}"), stop_token_ids=(a,)))
    assert a not in legal(rows)
    rows.admit(admit(regex_grammar("aa"), stop_token_ids=(a, b)))
    rows.advance([0], [ids_of("z")[0]])
    assert legal(rows) == {a, b}


def test_without_stop_tokens_there_is_no_end(rows: GrammarRows) -> None:
    (a,) = ids_of("a")
    rows.admit(admit(choice_grammar(["a"]), stop_token_ids=()))
    assert legal(rows) == {a}
    rows.advance([0], [a])
    assert legal(rows) == set(range(584))


def test_a_token_that_does_not_fit_ends_the_turn(rows: GrammarRows) -> None:
    for wrong in (7, EOS[0]):
        rows.admit(admit(choice_grammar(["ab"])))
        rows.advance([0], [wrong])
        assert legal(rows) == set(EOS)
        assert errors(rows) is None


def test_free_until_the_start_token(rows: GrammarRows) -> None:
    grammar = choice_grammar(["a"], start_id=THINK_END, banned_ids=(TOOL_CALL,))
    rows.admit(admit(grammar, [1, 2]))
    assert set(range(560)) - legal(rows) == {TOOL_CALL, *EOS}
    rows.advance([0], [THINK_END])
    assert legal(rows) == set(ids_of("a"))
    rows.admit(admit(grammar, [1, THINK_END, *ids_of("a")]))
    assert legal(rows) == set(EOS)


def test_looking_ahead_does_not_move_the_row(rows: GrammarRows) -> None:
    rows.admit(admit(choice_grammar(["~`^"], start_id=THINK_END)))
    a, b, c = ids_of("~`^")
    before = legal(rows)
    found = sets(rows.look_ahead([0], [[5, THINK_END, a, b, c, EOS[0]]]))
    assert found[0] == found[1] == before
    assert found[2:6] == [{a}, {b}, {c}, set(EOS)]
    wrong = sets(rows.look_ahead([0], [[THINK_END, a, a, b]]))
    assert [bool(mask) for mask in wrong] == [True, True, True, False, False]
    assert legal(rows) == before
    rows.advance([0], [THINK_END])
    assert legal(rows) == {a}


def fresh(tiny_model: Path, grammar: Grammar, token_ids: Sequence[int]) -> set[int]:
    """Of a new matcher, straight from the library."""
    tokens = library.read_tokenizer(tiny_model, 584)
    matcher = library.make_matcher(tokens, grammar.text)
    assert matcher.try_consume_tokens(list(token_ids)) == len(token_ids)
    words = array("i", bytes(4 * 19))
    matcher.unsafe_compute_mask_ptr(words.buffer_info()[0], 4 * 19)
    mask = sets(torch.tensor([words.tolist()], dtype=torch.int32))[0]
    return mask - {tokens.eos_token} | (set(EOS) if matcher.is_accepting() else set())


@pytest.mark.parametrize("num_threads", [1, 4])
def test_masks_depend_on_the_tokens_so_far_alone(
    make_rows: Callable[..., GrammarRows], tiny_model: Path, calls: Grammar, num_threads: int
) -> None:
    """Step by step, guessed ahead, resumed and of a new matcher, with other rows at work."""
    rows = make_rows(num_threads)
    schemas = [closed(random_schema(seed, free_keys=False)) for seed in range(4)]
    grammars = [*map(schema_grammar, schemas)]
    grammars += [calls, choice_grammar(["forced text", "forced words"])]
    grammars += [regex_grammar("([a-f]+ ){2,4}"), grammars[0]]
    rng = random.Random(num_threads)
    taken: dict[int, list[int]] = {number: [] for number in range(len(grammars))}
    for number, grammar in enumerate(grammars):
        rows.admit(admit(grammar, row=number))
    for step in range(40):
        live = [number for number, ids in taken.items() if not set(ids) & set(EOS)]
        now = {number: legal(rows, number) for number in live}
        walks: dict[int, list[int]] = {}
        for number in live:
            choices = sorted(now[number], key=lambda i: (i in EOS, rng.random()))
            walks[number] = [choices[0], *rng.sample(range(560), 2)]
        ahead = sets(rows.look_ahead(live, list(walks.values())))
        for index, number in enumerate(live):
            assert ahead[4 * index] == now[number]
            taken[number].append(walks[number][0])
        rows.advance(live, [walks[number][0] for number in live])
        for index, number in enumerate(live):
            assert legal(rows, number) == ahead[4 * index + 1]
            rows.admit(admit(grammars[number], taken[number], row=99))
            assert legal(rows, 99) == legal(rows, number)
            if step % 5 == number % 5 and not set(taken[number]) & set(EOS):
                assert legal(rows, number) == fresh(tiny_model, grammars[number], taken[number])
    assert any(ids[-1] in EOS for ids in taken.values())
    assert not rows.errors(range(100))


def test_guesses_that_were_right_give_the_same_masks(rows: GrammarRows, tiny_model: Path) -> None:
    """A forced text, guessed and taken several tokens at a time."""
    grammar = choice_grammar(["forced text", "forced words"])
    rows.admit(admit(grammar))
    taken: list[int] = []
    while True:
        guesses: list[int] = []
        for _ in range(3):
            masks = sets(rows.look_ahead([0], [guesses]))
            guesses.append(min(masks[-1]))
        assert legal(rows) == masks[0]
        if guesses[0] in EOS:
            break
        new = [token for token in guesses if token not in EOS]
        taken += new
        rows.advance([0] * len(new), new)
        assert legal(rows) == fresh(tiny_model, grammar, taken)


# --- limits and faults ------------------------------------------------------------------------


def test_a_limit_ends_only_its_row(rows: GrammarRows, limit: Callable[..., None]) -> None:
    limit(step_max_items=100)
    bad, good = admit(lark_grammar(MANY_WAYS)), admit(lark_grammar(MANY_WAYS), row=1)
    rows.admit(bad)
    rows.admit(good)
    assert legal(rows) >= set(ids_of("xy"))
    rows.advance([0, 1], ids_of("yx"))
    assert legal(rows) == set(EOS)
    assert set(ids_of("abc")) <= legal(rows, 1)
    found = rows.errors([0, 1, 2])
    assert found.keys() == {0}
    assert found[0][0] == 0
    assert "cannot be followed after 1 tokens" in found[0][1]
    assert "Too many items" in found[0][1]
    rows.advance([0, 1], [EOS[0], *ids_of("a")])  # as in the plan that is in flight
    assert legal(rows) == set(EOS)
    assert sets(rows.look_ahead([0], [[1, 2]]))[0] == set(EOS)
    assert rows.errors([0, 1]) == found
    rows.admit(admit(lark_grammar(MANY_WAYS), ids_of("x")))
    assert set(ids_of("abc")) <= legal(rows)
    assert errors(rows) is None
    rows.admit(admit(lark_grammar(MANY_WAYS), ids_of("y")))  # replayed
    assert legal(rows) == set(EOS)
    assert errors(rows) is not None


def test_a_limit_on_a_guessed_path_counts_if_the_path_is_taken(
    rows: GrammarRows, limit: Callable[..., None]
) -> None:
    limit(step_max_items=100)
    rows.admit(admit(lark_grammar(MANY_WAYS)))
    x, y, a = ids_of("xya")
    before = legal(rows)
    found = sets(rows.look_ahead([0], [[y, a, a]]))
    assert found == [before, set(EOS), set(), set()]
    assert rows.errors([0])[0][0] == 1  # a second token would be wrong
    assert legal(rows) == before
    rows.advance([0], [x])
    assert sets(rows.look_ahead([0], [[a, a]]))[2] > {a}
    assert errors(rows) is None
    rows.advance([0, 0], [a, a])
    assert legal(rows) > {a}
    assert errors(rows) is None
    rows.admit(admit(lark_grammar(MANY_WAYS)))
    rows.look_ahead([0], [[y, a, a]])
    rows.advance([0], [y])
    assert legal(rows) == set(EOS)
    assert errors(rows)[0] == 0


def test_states_of_other_rows_are_no_limit(
    make_rows: Callable[..., GrammarRows], limit: Callable[..., None], tiny_model: Path
) -> None:
    """The library counts them together. Rows that had no share in them go on."""
    walks = [
        ids_of("y") + ids_of(f"{seed:08b}".replace("0", "a").replace("1", "b"))
        for seed in range(12)
    ]
    grammar = lark_grammar(MANY_STATES)

    def walk() -> tuple[list[set[int]], bool]:
        rows, found = make_rows(), []
        for number, token_ids in enumerate(walks):
            rows.admit(admit(grammar, row=number))
            for token_id in token_ids:
                found.append(legal(rows, number))
                rows.advance([number], [token_id])
        for number in range(len(walks)):
            found.append(legal(rows, number))
        return found, bool(rows.errors(range(12)))

    plain = walk()
    limit(max_lexer_states=300)
    assert walk() == plain
    base = library.make_matcher(library.read_tokenizer(tiny_model, 584), grammar.text)
    copies = [base.deep_copy() for _ in walks]
    for matcher, token_ids in zip(copies, walks, strict=True):
        for token_id in token_ids:
            matcher.compute_bitmask()
            matcher.try_consume_tokens([token_id])
    assert any(matcher.is_error() for matcher in copies), "the limit was not reached"


def test_a_grammar_that_cannot_be_read_ends_its_row(rows: GrammarRows) -> None:
    rows.admit(admit(lark_grammar("start: nothing")))
    assert legal(rows) == set(EOS)
    assert "nothing" in errors(rows)[1]


def test_without_a_vocabulary_rows_with_grammars_fail(
    make_rows: Callable[..., GrammarRows], tmp_path: Path, tiny_model: Path
) -> None:
    rows = make_rows(path=tmp_path)
    rows.admit(admit(choice_grammar(["a"])))
    assert legal(rows) == set(EOS)
    assert "tokenizer.json" in errors(rows)[1]
    shutil.copy(tiny_model / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    rows = make_rows(path=tmp_path)
    rows.admit(admit(choice_grammar(["a"], start_id=THINK_END)))
    assert legal(rows) == set(EOS)
    assert errors(rows) is not None


def test_a_panic_of_the_library_ends_only_its_row(
    rows: GrammarRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    def panic(*_: Any) -> None:
        raise Panic("index out of bounds")

    good = library.make_matcher
    monkeypatch.setattr("glimmer.workers.sampling.grammars.make_matcher", panic)
    rows.admit(admit(choice_grammar(["a"])))
    assert legal(rows) == set(EOS)
    assert "index out of bounds" in errors(rows)[1]
    monkeypatch.setattr("glimmer.workers.sampling.grammars.make_matcher", good)
    rows.admit(admit(choice_grammar(["a"]), row=1))
    assert legal(rows, 1) == set(ids_of("a"))


def test_rows_are_shared_out_among_threads_that_end(
    make_rows: Callable[..., GrammarRows],
) -> None:
    before = threading.active_count()
    rows = make_rows(3)
    assert threading.active_count() == before + 3
    for number in range(6):
        rows.admit(admit(choice_grammar(["a"]), row=number))
    rows.free(0)
    rows.free(77)
    rows.admit(admit(choice_grammar(["b"]), row=7))
    assert [legal(rows, number) for number in (1, 7)] == [set(ids_of("a")), set(ids_of("b"))]
    rows.close()
    assert threading.active_count() == before


# --- in the engine ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_json_is_valid_whatever_is_sampled(engine: Engine, tokenizer: Tokenizer, seed: int) -> None:
    schema = closed(random_schema(seed, free_keys=False))
    grammar = schema_grammar(schema)
    validator = jsonschema_rs.validator_for(schema)
    sampling = wishes(seed, temperature=(0.0, 1.0, 2.0)[seed % 3], presence_penalty=0.5)
    for ids in engine.generate([[5, 6], [7]], sampling, grammar=grammar):
        assert validator.is_valid(json.loads(text(tokenizer, ids)))


def test_free_rows_do_not_notice_constrained_ones(engine: Engine, tokenizer: Tokenizer) -> None:
    grammars = [None, schema_grammar(SCHEMA), None, regex_grammar("[a-f]{9,40}")]
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
    tiny_model: Path, tmp_path: Path, engine: Engine, tokenizer: Tokenizer
) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 12, "maxItems": 20}
    grammar = schema_grammar(schema, start_id=THINK_END)
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
    assert any(THINK_END in a.output_ids for a in resumed)
    for ids in found:
        if ids[-1] in EOS:
            json.loads(tokenizer.decode(ids[ids.index(THINK_END) + 1 : -1]))


def test_other_wishes_give_way_to_the_grammar(engine: Engine, tokenizer: Tokenizer) -> None:
    grammar = choice_grammar(["yes", "no"])
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


def test_calls_are_made_of_tag_tokens(engine: Engine, tokenizer: Tokenizer, calls: Grammar) -> None:
    (ids,) = engine.generate([[3]], wishes(), grammar=calls)
    tags = [i for i in ids if i >= 524]
    count = len(tags) // 6
    assert tags[:-1] == [547, 551, 552, 553, 554, 548] * count
    assert tags[-1] in EOS
    pattern = "(<tool_call>f<arg_key>n</arg_key><arg_value>(1|22)</arg_value></tool_call>)+"
    assert re.fullmatch(pattern, tokenizer.decode(ids[:-1]))


def test_logprobs_are_those_of_the_masked_choice(engine: Engine) -> None:
    grammar = choice_grammar(["a", "b"])
    sampling = wishes(num_logprobs=3, temperature=1.0)
    engine.generate([[3]], sampling, grammar=grammar)
    rows = [row for m in engine.messages for row in getattr(m, "rows", []) if row.logprobs]
    first = rows[0].logprobs[0]
    likely = dict(first.top)
    letters = {ord("a") - 33, ord("b") - 33}
    assert set(likely) >= letters
    assert sum(torch.tensor([likely[i] for i in letters]).exp()) == pytest.approx(1, abs=1e-4)
    assert [value for i, value in first.top if i not in letters] == [-9999.0]


def test_nothing_is_left_behind(engine: Engine) -> None:
    grammar = schema_grammar(SCHEMA)
    engine.generate([[1], [2], [3]], wishes(), grammar=grammar)
    engine.generate([[4]], wishes(max_new_tokens=2))
    assert engine.runner.grammars is not None
    assert engine.runner.grammars.rows == set()


@pytest.mark.parametrize("changes", [{}, {"mtp_mode": "eagle_with_att", "mtp_step": 3}], ids=str)
def test_a_limit_ends_its_request_and_no_other(
    tiny_model: Path, tmp_path: Path, limit: Callable[..., None], changes: dict[str, Any]
) -> None:
    """In steps with prompt chunks, with drafts, and with a plan in flight."""
    grammars = [None, choice_grammar(["xa", "xb"]), lark_grammar(MANY_WAYS), regex_grammar("[xy]+")]
    prompts = [[5, 6, 7 + n] * 4 for n in range(4)]
    bans = tuple((i, -100.0) for i in ids_of("x"))  # where it can, it goes the way of y
    sampling = wishes(3, max_new_tokens=40, logit_bias=bans)
    expected = Engine(tiny_model, tmp_path).generate_each(
        prompts, sampling, [None, grammars[1], None, grammars[3]]
    )
    limit(step_max_items=100)
    engine = Engine(tiny_model, tmp_path, chunked_prefill_size=7, **changes)
    engine.may_fail = True
    found = engine.generate_each(prompts, sampling, grammars)
    assert [found[n] for n in (0, 1, 3)] == [expected[n] for n in (0, 1, 3)]
    assert found[2] == ids_of("y")[: len(found[2])]
    ended = [m for m in engine.messages if isinstance(m, Finished) and m.reason == "invalid"]
    assert [(m.request_id, m.field) for m in ended] == [(2, "field")]
    assert "after 1 tokens" in ended[0].message
    assert engine.runner.grammars is not None
    assert engine.runner.grammars.rows == set()


def test_a_row_taken_over_while_its_last_step_runs_starts_its_grammar_anew(
    tiny_model: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """A request ends one step before the host knows. The next request gets its row at once, and
    must not be given the token that the step sampled in vain."""
    engine = Engine(tiny_model, tmp_path, running_max_req_size=1)
    grammar = choice_grammar(["yes", "no"])
    prompts = [[5, 6, n] for n in range(8)]
    replies = engine.generate(prompts, wishes(max_new_tokens=9), grammar=grammar)
    assert {text(tokenizer, reply) for reply in replies} <= {"yes", "no"}
