"""What the heartbeat says; tests/scheduler/test_core.py counts whole requests."""

from fakes import FakeEngine
from glimmer.scheduler.counts import Counts


def test_states_and_counts_are_told() -> None:
    engine = FakeEngine(64, running_max_req_size=1)
    for _ in range(3):
        engine.submit(list(range(9)), 40)
    core = engine.core
    counts = Counts(steps=4, malformed_messages=2, generated_tokens=7)
    beat = counts.heartbeat(core.workers, core._requests.values(), 5, draft_length=3)
    assert (beat.steps, beat.generated_tokens, beat.malformed_messages) == (4, 7, 7)
    assert (beat.num_running, beat.num_waiting, beat.num_paused) == (1, 2, 0)
    assert (beat.pages_total, beat.worker_ready, beat.draft_length) == (64, True, 3)
