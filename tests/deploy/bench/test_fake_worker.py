"""The fake worker answers every sampling row of a plan, and nothing else."""

from pathlib import Path

from glimmer.deploy.bench.fake_worker import answer, cycle
from glimmer.shared.messages import PrefillChunk, StepPlan


def test_one_token_for_each_sampling_row() -> None:
    chunks = [PrefillChunk(0, 0, [1, 2], sample=False, next_id=3), PrefillChunk(1, 0, [4], True)]
    plan = StepPlan(3, 17, [], [], [], chunks, decode=[2, 5])
    result = answer(plan, [8, 9])
    assert [row.token_ids for row in result.rows] == [[9]] * 3
    assert (result.epoch, result.step) == (3, 17)
    assert answer(StepPlan(3, 18, [2], [], [], [], []), [8]).rows == []


def test_the_tokens_are_text_and_calls(tiny_model: Path) -> None:
    tokens = cycle(tiny_model)
    assert len(tokens) > 100
    assert len(set(tokens)) > 40
    assert max(tokens) < 560
