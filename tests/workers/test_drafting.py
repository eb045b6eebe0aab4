"""Steps with drafts in the real runner, planned by the real scheduler: whatever the drafts are,
tokens, endings and log-probabilities are those without."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from engine import Engine
from glimmer.deploy.demo.checkpoint import make_checkpoint
from glimmer.frontend.text.tokenizer import Tokenizer
from glimmer.shared.messages import Finished, StepPlan, Submit, TokenLogprob, Tokens
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from grammars import calls_grammar, choice_grammar, schema_grammar

CONFIG: dict[str, Any] = {
    "max_req_total_len": 64,
    "max_total_token_num": 240,
    "page_size": 4,
    "running_max_req_size": 5,
    "batch_max_tokens": 96,
    "chunked_prefill_size": 9,
}
MODES = pytest.mark.parametrize("mode", ["eagle_with_att", "vanilla_with_att"])
EOS = (524, 531, 533)
THINK_END = 546


@dataclass
class Reply:
    """Everything that a client received."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str = ""


def replies(engine: Engine, submits: Sequence[Submit]) -> dict[int, Reply]:
    engine.messages.clear()
    engine.run(submits)
    found = {submit.request_id: Reply() for submit in submits}
    for message in engine.messages:
        if isinstance(message, Tokens):
            for row in message.rows:
                reply = found[row.request_id]
                reply.tokens += row.token_ids
                reply.logprobs += row.logprobs
                reply.prompt_logprobs += row.prompt_logprobs
        elif isinstance(message, Finished):
            found[message.request_id].reason = message.reason
    return found


def assert_equal(found: dict[int, Reply], plain: dict[int, Reply]) -> None:
    for number, reply in plain.items():
        other = found[number]
        assert (other.tokens, other.reason) == (reply.tokens, reply.reason), number
        for kind in ("logprobs", "prompt_logprobs"):
            pairs = zip(getattr(other, kind), getattr(reply, kind), strict=True)
            for a, b in pairs:
                assert (a.token_id, a.rank) == (b.token_id, b.rank)
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
                assert [i for i, _ in a.top] == [i for i, _ in b.top]
                assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-4)


def hints(plain: dict[int, Reply]) -> dict[int, list[int]]:
    return {number: reply.tokens for number, reply in plain.items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights: its drafts are wrong, so the tests replace them by right ones."""
    path = tmp_path_factory.mktemp("drafting")
    make_checkpoint(path, seed=7)
    return path


@pytest.fixture
def engine_of(path: Path, tmp_path: Path) -> Callable[..., Engine]:
    return lambda **changes: Engine(path, tmp_path, **{**CONFIG, **changes})


# --- under any pressure -----------------------------------------------------------------------


def submits() -> list[Submit]:
    """Short and long ones, greedy, drawn and under rules, some with equal beginnings."""
    rng = random.Random(5)
    prefixes = [[rng.randrange(90) for _ in range(30)] for _ in range(2)]
    made = []
    for number in range(10):
        prompt = [*rng.choice(prefixes)[: rng.randrange(30)], rng.randrange(90)]
        params: dict[str, Any] = {"max_new_tokens": rng.choice((1, 6, 25, 100))}
        params |= {"stop_token_ids": tuple(range(0, 500, 17)), "temperature": 0.0}
        if number % 3 == 1:
            params |= {"temperature": 0.8, "top_p": 0.9, "seed": number, "num_logprobs": 2}
        if number % 3 == 2:
            params |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "min_new_tokens": 4}
            params |= {"num_logprobs": 0, "num_prompt_logprobs": number % 2}
        made.append(Submit(number + 1, 0, prompt, SamplingParams(**params)))
    return made


@pytest.fixture(scope="module")
def plain(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Reply]:
    engine = Engine(path, tmp_path_factory.mktemp("plain"), **CONFIG)
    return replies(engine, submits())


@MODES
@pytest.mark.parametrize(
    "changes",
    [
        {"mtp_step": 1},
        {"mtp_step": 4, "mtp_fixed_step": True},
        {"mtp_step": 7},
        {"mtp_step": 4, "page_size": 1, "max_total_token_num": 100},
        {"mtp_step": 3, "max_total_token_num": 72, "mtp_fixed_step": True, "batch_max_tokens": 64},
        {"mtp_step": 2, "disable_dynamic_prompt_cache": True, "chunked_prefill_size": 64},
        {"mtp_step": 2, "mtp_hidden_states": ("before_norm", "after_norm")},
    ],
    ids=str,
)
def test_tokens_ends_and_logprobs_are_those_without_drafts(
    engine_of: Callable[..., Engine], plain: dict[int, Reply], mode: str, changes: dict[str, Any]
) -> None:
    engine = engine_of(mtp_mode=mode, **changes)
    engine.hints = hints(plain)
    assert_equal(replies(engine, submits()), plain)
    assert engine.accepted_tokens > 10
    assert engine.preemptions or changes.get("max_total_token_num") != 72
    plans = [m for m in engine.messages if isinstance(m, StepPlan)]
    assert any(plan.prefill and plan.decode and plan.num_drafts for plan in plans)
    is_cut = any(chunk.next_id >= 0 for plan in plans for chunk in plan.prefill)
    assert is_cut or "chunked_prefill_size" in changes


@MODES
def test_steps_with_and_without_drafts_follow_each_other(
    engine_of: Callable[..., Engine],
    plain: dict[int, Reply],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(mtp_mode=mode, mtp_step=4)
    lengths = iter([0, 3, 1, 0, 0, 4, 2, 4, 0, 1] * 99)
    monkeypatch.setattr(engine.core._drafts, "choose", lambda *_: next(lengths))
    engine.hints = hints(plain)
    assert_equal(replies(engine, submits()), plain)
    plans = [m for m in engine.messages if isinstance(m, StepPlan) and m.decode]
    assert {plan.num_drafts for plan in plans if plan.prefill} >= {0, 1}
    assert {plan.num_drafts for plan in plans} == {0, 1, 2, 3, 4}


def test_bans_of_everything_are_void_for_the_tokens_they_concern(
    engine_of: Callable[..., Engine],
) -> None:
    """At first all tokens are banned, from the seventh on all but one."""
    bans = tuple((i, -100.0) for i in range(560) if i != EOS[0])
    params = SamplingParams(
        max_new_tokens=30, stop_token_ids=EOS[:1], min_new_tokens=6, logit_bias=bans
    )
    asked = [Submit(number, 0, [number + 1], params) for number in range(3)]
    plain = replies(engine_of(), asked)
    assert {(len(reply.tokens), reply.tokens[-1]) for reply in plain.values()} == {(7, EOS[0])}
    engine = engine_of(mtp_mode="eagle_with_att", mtp_step=4, mtp_fixed_step=True)
    engine.hints = hints(plain)
    assert_equal(replies(engine, asked), plain)
    assert engine.accepted_tokens > 6


def test_benchmarks_of_noise_can_force_acceptance(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(
        mtp_mode="eagle_with_att",
        mtp_step=3,
        mtp_fixed_step=True,
        mtp_forced_acceptance=(0.7, 0.5, 0.35),
        load_format="dummy",
        max_req_total_len=2048,
        max_total_token_num=16384,
        running_max_req_size=10,
    )
    engine.generate([[n] for n in range(10)], SamplingParams(max_new_tokens=300))
    beat = engine.core.heartbeat()
    shares = [a / o for a, o in zip(beat.drafts_accepted, beat.drafts_offered, strict=True)]
    assert shares == pytest.approx([0.7, 0.5, 0.35], abs=0.05)


# --- grammars ---------------------------------------------------------------------------------


def constrained(path: Path) -> list[Submit]:
    """Schemas, forced calls and choices, some after reasoning, beside free rows."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 20},
            "values": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
        },
        "required": ["name", "values"],
    }
    call = {
        "name": "get_weather",
        "parameters": {"properties": {"unit": {"enum": ["c", "f"]}}, "required": ["unit"]},
    }
    tags = Tokenizer(path, load_model_spec(path).vocab_size).vocabulary.added_ids
    grammars = [
        schema_grammar(schema),
        None,
        calls_grammar(call, tags),
        schema_grammar(schema, start_id=THINK_END, banned_ids=(547,)),
        choice_grammar(["yes", "no", "perhaps"]),
        None,
    ]
    made = []
    for number, grammar in enumerate([*grammars, *grammars]):
        params: dict[str, Any] = {"max_new_tokens": 120, "stop_token_ids": EOS, "seed": number}
        params["temperature"] = 0.0 if number < len(grammars) else 1.0
        params["num_logprobs"] = number % 3 - 1
        if number % 4 == 3:
            params |= {"presence_penalty": 0.5, "min_new_tokens": 30}
        if number in (6, 9):
            params |= {"max_new_tokens": 17}
        if grammar is not None and grammar.start_id >= 0:
            params["logit_bias"] = ((THINK_END, 9.0),)
        prompt = [number + 1] * (3 * number + 1)
        made.append(Submit(number, 0, prompt, SamplingParams(**params), grammar=grammar))
    return made


WIDE = {"max_req_total_len": 256, "max_total_token_num": 2048}


@pytest.fixture(scope="module")
def plain_constrained(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Reply]:
    engine = Engine(path, tmp_path_factory.mktemp("plain"), **{**CONFIG, **WIDE})
    found = replies(engine, constrained(path))
    assert {reply.reason for reply in found.values()} == {"stop", "length"}
    return found


@MODES
@pytest.mark.parametrize(
    "changes",
    [
        {"mtp_step": 1},
        {"mtp_step": 3},
        {"mtp_step": 7, "mtp_fixed_step": True},
        {"mtp_step": 3, "mtp_fixed_step": True, "max_total_token_num": 260, "batch_max_tokens": 64},
    ],
    ids=str,
)
def test_grammars_are_obeyed_as_without_drafts(
    engine_of: Callable[..., Engine],
    path: Path,
    plain_constrained: dict[int, Reply],
    mode: str,
    changes: dict[str, Any],
) -> None:
    engine = engine_of(mtp_mode=mode, **{**WIDE, **changes})
    engine.hints = hints(plain_constrained)
    assert_equal(replies(engine, constrained(path)), plain_constrained)
    accepted = {
        m.request_id: m.mtp_accepted_tokens for m in engine.messages if isinstance(m, Finished)
    }
    grammars = {submit.request_id: submit.grammar for submit in constrained(path)}
    assert sum(accepted[number] for number, grammar in grammars.items() if grammar) > 50
    assert engine.preemptions or "max_total_token_num" not in changes


def test_wrong_guesses_of_a_grammar_row_cost_nothing_but_time(
    engine_of: Callable[..., Engine], path: Path, plain_constrained: dict[int, Reply]
) -> None:
    engine = engine_of(mtp_mode="eagle_with_att", mtp_step=3, mtp_fixed_step=True, **WIDE)
    assert_equal(replies(engine, constrained(path)), plain_constrained)
