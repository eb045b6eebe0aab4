"""Warm-up steps leave no trace, at any limits of the server."""

from pathlib import Path
from typing import Any

import pytest
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.warm_up import run_largest_step, run_usual_steps, warm_up

PENALISED = SamplingParams(max_new_tokens=9, frequency_penalty=1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_max_tokens": 100, "chunked_prefill_size": 40, "max_req_total_len": 96},
        {"batch_max_tokens": 300, "chunked_prefill_size": 300, "max_req_total_len": 2048},
        {"batch_max_tokens": 64, "chunked_prefill_size": 8, "running_max_req_size": 1},
        {"batch_max_tokens": 64, "chunked_prefill_size": 64, "mtp_step": 3},
    ],
)
def test_they_are_forgotten(
    tiny_model: Path, make_runner: Any, config_of: Any, changes: dict[str, int]
) -> None:
    mode = {"mtp_mode": "eagle_with_att"} if "mtp_step" in changes else {}
    config = config_of(tiny_model, **changes, **mode)
    chunk = PrefillChunk(0, 0, [3, 1, 4], sample=True)
    plan = StepPlan(0, 0, [], [RowAdmit(0, PENALISED, [5], 0, 0, [])], [], [chunk], [])
    fresh = make_runner(tiny_model, **changes, **mode).run(plan)
    runner = make_runner(tiny_model, **changes, **mode)
    warm_up(runner)
    run_largest_step(runner, config)
    run_usual_steps(runner, config)
    assert runner.run(plan).rows == fresh.rows
