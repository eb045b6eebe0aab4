"""The fake worker answers every sampling row of a plan, and nothing else."""

from glimmer.deploy.bench.fake_worker import answer
from glimmer.shared.messages import PrefillChunk, StepPlan


def test_one_token_for_each_sampling_row() -> None:
    chunks = [PrefillChunk(0, 0, [1, 2], sample=False, next_id=3), PrefillChunk(1, 0, [4], True)]
    plan = StepPlan(3, 17, [], [], [], chunks, decode=[2, 5])
    result = answer(plan)
    assert (result.epoch, result.step) == (3, 17)
    assert [len(row.token_ids) for row in result.rows] == [1, 1, 1]
    assert answer(StepPlan(3, 18, [2], [], [], [], [])).rows == []
