"""Scheduler and drafting together: the same tokens with and without drafts, under any pressure."""

import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from draft_runner import DraftRunner
from glimmer.deploy.demo.checkpoint import make_checkpoint
from glimmer.scheduler.core import Scheduler
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import Finished, Ready, StepPlan, Submit, Tokens
from glimmer.shared.sampling import SamplingParams

CONFIG: dict[str, Any] = {
    "data_type": "float32",
    "max_req_total_len": 64,
    "page_size": 4,
    "running_max_req_size": 5,
    "batch_max_tokens": 96,
    "chunked_prefill_size": 9,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of noise: its drafts are wrong, so the tests put right ones in their place."""
    path = tmp_path_factory.mktemp("plans")
    make_checkpoint(path, seed=7)
    return path


def submits() -> list[Submit]:
    rng = random.Random(5)
    prefixes = [[rng.randrange(90) for _ in range(30)] for _ in range(2)]
    made = []
    for number in range(10):
        prompt = [*rng.choice(prefixes)[: rng.randrange(30)], rng.randrange(90)]
        params: dict[str, Any] = {"max_new_tokens": rng.choice((1, 6, 25, 100))}
        params |= {"stop_token_ids": tuple(range(0, 500, 17)), "temperature": 0.0}
        if number % 3 == 1:
            params |= {"temperature": 0.8, "top_p": 0.9, "seed": number}
        if number % 3 == 2:
            params |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "min_new_tokens": 4}
        made.append(Submit(number + 1, 0, prompt, SamplingParams(**params)))
    return made


def serve(path: Path, num_pages: int = 60, hints: Any = None, **changes: Any) -> dict[str, Any]:
    """Outputs by request, and how it went; two plans are under way at most times. `hints`: outputs
    that are known already, put in place of most drafts."""
    config = ServeConfig(model_dir=str(path), **{**CONFIG, **changes})
    core, runner = Scheduler(config), DraftRunner(path, config, num_pages)
    outputs: dict[int, list[int]] = {}
    finished: dict[int, Finished] = {}
    inbox: list[Any] = [Ready("worker", 0, 0, num_pages), *submits()]
    plans: deque[StepPlan] = deque()
    rng = random.Random(1)
    now_ns = 0
    while len(finished) < 10:
        while True:
            plan, outbox = core.step(now_ns, inbox)
            inbox = []
            core.check_integrity()
            for out in outbox:
                if isinstance(out.message, Tokens):
                    for row in out.message.rows:
                        outputs.setdefault(row.request_id, []).extend(row.token_ids)
                elif isinstance(out.message, Finished):
                    finished[out.message.request_id] = out.message
            if plan is None:
                break
            plans.append(plan)
        if plans:
            inbox = [runner.run(plans.popleft())]
            now_ns += 1_000_000 * rng.randint(5, 15)
            if hints:
                _hint(core, runner, hints, rng)
    return {
        "outputs": outputs,
        "reasons": {number: end.reason for number, end in finished.items()},
        "accepted": runner.num_accepted,
        "told": sum(end.mtp_accepted_tokens for end in finished.values()),
        "preemptions": core.heartbeat().preemptions,
    }


def _hint(core: Scheduler, runner: DraftRunner, hints: Any, rng: random.Random) -> None:
    by_row = {r.row: r for r in core._running}
    for row, request in by_row.items():
        done = int(runner.state.num_outputs[row])
        following = hints[request.request_id][done : done + runner.state.drafts.shape[1]]
        for place, token in enumerate(following):
            if rng.random() < 0.8:
                runner.state.drafts[row, place] = token


@pytest.fixture(scope="module")
def plain(path: Path) -> dict[str, Any]:
    return serve(path)


@pytest.mark.parametrize("mode", ["eagle_with_att", "vanilla_with_att"])
@pytest.mark.parametrize(
    "changes",
    [
        {"mtp_step": 1},
        {"mtp_step": 4, "mtp_fixed_step": True},
        {"mtp_step": 7},
        {"mtp_step": 4, "page_size": 1, "num_pages": 90},
        {"mtp_step": 3, "num_pages": 18, "mtp_fixed_step": True},
        {"mtp_step": 2, "disable_dynamic_prompt_cache": True, "chunked_prefill_size": 64},
    ],
    ids=str,
)
def test_tokens_and_ends_are_those_without_drafts(
    path: Path, plain: dict[str, Any], mode: str, changes: dict[str, Any]
) -> None:
    found = serve(path, hints=plain["outputs"], mtp_mode=mode, **changes)
    assert found["outputs"] == plain["outputs"]
    assert found["reasons"] == plain["reasons"]
    assert found["accepted"] >= found["told"] > 10
    assert found["preemptions"] or "num_pages" not in changes or changes["num_pages"] > 18
