"""Thinking budgets: a reply is the one without a budget up to the limit, and then the reasoning
ends, whatever drafts, grammars, other rows or preemption do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine
from glimmer.deploy.demo.checkpoint import make_checkpoint
from glimmer.frontend.text.tokenizer import Tokenizer
from glimmer.shared.messages import Submit
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.sampling.thinking import ThinkingBudgets
from grammars import schema_grammar

THINK_END = 546
EOS = (524, 531, 533)
CONFIG: dict[str, Any] = {
    "max_req_total_len": 128,
    "max_total_token_num": 2048,
    "page_size": 4,
    "running_max_req_size": 6,
    "batch_max_tokens": 96,
    "chunked_prefill_size": 9,
}
BUDGETS = (0, 1, 2, 7, 30, -1, 7, 1000, 12, 3, 4, 4, 4, 4)
SCHEMA = {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thinking")
    make_checkpoint(path, seed=7)
    return path


@pytest.fixture
def engine_of(path: Path, tmp_path: Path) -> Callable[..., Engine]:
    return lambda **changes: Engine(path, tmp_path, **{**CONFIG, **changes})


def submits(budgets: tuple[int, ...] = BUDGETS) -> list[Submit]:
    """Greedy and drawn replies: some whose rules speak against the end of the reasoning, one that
    ends it at once, two with a grammar after it, and some that end it by themselves or not."""
    made = []
    for number, budget in enumerate(budgets):
        params: dict[str, Any] = {"max_new_tokens": 40, "num_logprobs": 1, "seed": number}
        params["temperature"] = float(number % 2)
        if number == 2:
            params |= {"logit_bias": ((THINK_END, -100.0),), "presence_penalty": 1.0}
        if number == 3:
            params |= {"allowed_token_ids": tuple(range(60)), "min_new_tokens": 20}
        if number == 7:
            params |= {"logit_bias": ((THINK_END, 30.0),)}
        grammar = None
        if number >= 10:
            params |= {"logit_bias": ((THINK_END, 5.0),), "temperature": 1.0}
        elif number >= 8:
            grammar = schema_grammar(SCHEMA, start_id=THINK_END)
            params |= {"stop_token_ids": EOS, "max_new_tokens": 60}
        params |= {"thinking_budget": budget, "thinking_end_id": THINK_END}
        prompt = [number + 1] * (3 * number + 1)
        made.append(Submit(number, 0, prompt, SamplingParams(**params), grammar=grammar))
    return made


@pytest.fixture(scope="module")
def plain(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    return Engine(path, tmp_path_factory.mktemp("plain"), **CONFIG).run(submits())


def test_replies_are_those_without_a_budget_up_to_the_limit(
    engine_of: Callable[..., Engine], path: Path, plain: dict[int, list[int]]
) -> None:
    free = engine_of().run(submits((-1,) * len(BUDGETS)))
    assert all(THINK_END not in reply for number, reply in free.items() if number < 7)
    for number, budget in enumerate(BUDGETS):
        reply = plain[number]
        if budget < 0 or THINK_END in free[number][:budget]:
            assert reply == free[number]
        else:
            assert reply[:budget] == free[number][:budget]
            assert reply.index(THINK_END) == budget
    ends = {plain[number].index(THINK_END) for number in range(10, 14)}
    assert 4 in ends
    assert ends & {1, 2, 3}, "by themselves, within the same step as the limit"
    tokenizer = Tokenizer(path, load_model_spec(path).vocab_size)
    for number in (8, 9):
        answer = plain[number][BUDGETS[number] + 1 : -1]
        assert isinstance(json.loads(tokenizer.decode(answer)), list)
    tokenizer.close()


@pytest.mark.parametrize("mode", ["eagle_with_att", "vanilla_with_att"])
@pytest.mark.parametrize(
    "changes",
    [
        {"mtp_step": 1},
        {"mtp_step": 2, "running_max_req_size": 2},
        {"mtp_step": 4, "mtp_fixed_step": True},
        {"mtp_step": 7, "mtp_fixed_step": True, "max_total_token_num": 200},
    ],
    ids=str,
)
def test_drafts_and_preemption_change_no_token(
    engine_of: Callable[..., Engine],
    plain: dict[int, list[int]],
    mode: str,
    changes: dict[str, Any],
) -> None:
    engine = engine_of(mtp_mode=mode, **changes)
    engine.hints = plain
    assert engine.run(submits()) == plain
    assert engine.accepted_tokens > 20
    assert engine.preemptions or "max_total_token_num" not in changes


def test_a_budget_in_the_middle_of_wrong_drafts(
    engine_of: Callable[..., Engine], plain: dict[int, list[int]]
) -> None:
    """Drafts go past the limit without the token that is forced there."""
    engine = engine_of(mtp_mode="eagle_with_att", mtp_step=4, mtp_fixed_step=True)
    engine.hints = {number: [t for t in ids if t != THINK_END] for number, ids in plain.items()}
    assert engine.run(submits()) == plain


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [2, 6])
def test_on_a_card_where_steps_overlap(engine_of: Callable[..., Engine], num_rows: int) -> None:
    """With 2 rows they are taken over while their last steps run."""
    flags = {"device": "cuda", "running_max_req_size": num_rows, "page_size": 64}
    plain = engine_of(**flags).run(submits())
    for number, budget in enumerate(BUDGETS):
        assert THINK_END in plain[number][: budget + 1] or not 0 <= budget < 40
    answers = [plain[number][BUDGETS[number] + 1 : -1] for number in (8, 9)]
    assert all(answers), "not ended by another request's token"
    drafting = engine_of(mtp_mode="eagle_with_att", mtp_step=3, mtp_fixed_step=True, **flags)
    drafting.hints = plain
    assert drafting.run(submits()) == plain
    assert drafting.accepted_tokens > 20


def test_a_row_forgets_the_budget_of_its_last_request() -> None:
    budgets = ThinkingBudgets(3, torch.device("cpu"))
    params = SamplingParams(9, thinking_budget=2, thinking_end_id=5)
    budgets.admit(1, params, [])
    assert budgets.concerns([0, 1])
    rows, positions = torch.tensor([0, 1]), torch.tensor([2, 2])

    def forced(drafts: list[list[int]] | None = None) -> list[bool]:
        logits = torch.zeros(2, 8)
        before = None if drafts is None else torch.tensor(drafts)
        budgets.force(logits, rows, positions, before)
        return (logits.argmax(1) == 5).tolist()

    assert forced() == forced([[5, -1], [4, -1]]) == [False, True]
    assert forced([[5, -1], [4, 5]]) == [False, False]
    budgets.record(rows, torch.tensor([5, -1]))
    assert forced() == [False, True], "-1 is no token, and row 0 has no budget"
    budgets.record(rows, torch.tensor([5, 5]))
    assert forced() == [False, False]
    budgets.admit(1, params, [7])
    assert forced() == [False, True]
    budgets.admit(1, params, [7, 5])  # resumed after its reasoning
    assert (forced(), budgets.concerns([1])) == ([False, False], False)
    budgets.admit(1, params, [])
    budgets.admit(1, SamplingParams(9), [])
    assert (forced(), budgets.concerns([1])) == ([False, False], False)
